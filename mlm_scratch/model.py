"""Tokenizer and model, and the masked-LM loss with the head on masked positions only.

An encoder turns (B, T) ids into (B, T, H) hidden states; the LM head turns each hidden state into V
scores, one per vocabulary entry. Only the masked positions have a label, about 15 %, so only there
the head has to run: with V = 50,265 it is nearly half of all arithmetic of a distilroberta step.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mlm_scratch.errors import UserError
from mlm_scratch.masking import IGNORE
from mlm_scratch.recipes import BUNDLED, TrainConfig
from mlm_scratch.small_model import small_modernbert, train_tokenizer

# ---- The loss ------------------------------------------------------------------------------------


class MaskedLM(nn.Module):
    """A *ForMaskedLM model whose head runs on chosen positions only.

    Every such model is an encoder and a head that treats each position by itself. A hook on the
    encoder's output keeps the hidden states at the chosen positions, (B, T, H) -> (1, N, H), and
    the model's own head, whatever it is called, sees one row of N instead of B rows of T.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.positions: Tensor | None = None  # (N,), set during a forward pass
        self.hook = model.base_model.register_forward_hook(self._keep_positions)
        self.train(model.training)  # a new module starts in train mode

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None
    ) -> Tensor:
        """The logits at `positions`, (N,) indices into the flattened batch: (N, V).

        With positions None the head runs everywhere: (B * T, V).
        """
        self.positions = positions
        try:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            self.positions = None
        return logits.flatten(0, 1)  # (1, N, V) or (B, T, V) -> (N, V) or (B * T, V)

    def _keep_positions(self, encoder: nn.Module, inputs: tuple, output: Any) -> Any:
        if self.positions is not None:
            hidden = output["last_hidden_state"].flatten(0, 1)  # (B * T, H)
            output["last_hidden_state"] = hidden[self.positions].unsqueeze(0)  # (1, N, H)
        return output


def masked_lm_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    positions: Tensor | None = None,
    dense: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over the masked tokens of a batch, and their number.

    Args:
        model: a MaskedLM, or the AutoModelForMaskedLM to put into one for this call.
        input_ids, attention_mask: (B, T).
        labels: (B, T), the id to predict, -100 where there is none.
        positions: (N,) indices of the masked tokens in the flattened batch, if known. Looking for
            them in labels on a GPU makes the CPU wait.
        dense: run the head on all B * T positions, as the reference does.

    Returns:
        (loss_sum, n_masked), two scalar tensors: nats, and tokens. A sum, so that batches can be
        added up and divided once by the number of tokens in all of them.

    Source: the loss of transformers' *ForMaskedLM models, which is this sum over this number.
    """
    if isinstance(model, PreTrainedModel):
        wrapped = MaskedLM(model)
        try:
            return masked_lm_loss(
                wrapped, input_ids, attention_mask, labels, positions=positions, dense=dense
            )
        finally:
            wrapped.hook.remove()
    logits, labels = masked_lm_logits(model, input_ids, attention_mask, labels, positions, dense)
    # In fp32 under autocast too: a sum over 50,265 exponentials does not fit half precision.
    loss_sum = cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORE)
    return loss_sum, (labels != IGNORE).sum()


def masked_lm_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """What a MaskedLM thinks of the masked tokens, and what they are; arguments as above.

    Returns:
        (logits, labels), (N, V) and (N,); with `dense` N is B * T, and labels has its -100.
    """
    labels = labels.flatten()  # (B * T,)
    if dense:
        return model(input_ids, attention_mask, None), labels  # (B * T, V), (B * T,)
    if positions is None:
        positions = (labels != IGNORE).nonzero().squeeze(1)  # (N,)
    return model(input_ids, attention_mask, positions), labels[positions]  # (N, V), (N,)


@torch.no_grad()
def sparse_head_works(model: MaskedLM) -> bool:
    """Whether the head on chosen positions gives what the whole forward pass gives there.

    Tried on a small batch rather than looked up by name, so that a model nobody thought of is
    either right or runs dense.
    """
    device = next(model.parameters()).device
    input_ids = torch.arange(8, device=device).view(2, 4) % model.model.config.vocab_size  # (B, T)
    attention_mask = torch.ones_like(input_ids)  # (B, T)
    positions = torch.tensor([1, 2, 7], device=device)  # (N,)
    was_training = model.training
    model.eval()
    try:
        dense = model(input_ids, attention_mask, None)[positions]  # (N, V)
        sparse = model(input_ids, attention_mask, positions)  # (N, V)
        return sparse.shape == dense.shape and torch.allclose(sparse, dense, rtol=1e-3, atol=1e-4)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(was_training)


# ---- Tokenizer and model -------------------------------------------------------------------------


def load_tokenizer_and_model(
    config: TrainConfig, texts: Iterable[str], checkpoint: Path | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model (fp32, in train mode) that `config` names.

    Args:
        texts: read only for the bundled model, whose tokenizer is trained on them.
        checkpoint: take both from there instead, to go on with a run.

    Raises UserError for what cannot be loaded or cannot do masked-language modelling.
    """
    torch.manual_seed(config.seed)  # new weights are drawn from here
    if checkpoint is not None:
        tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    elif config.model == BUNDLED:
        tokenizer = train_tokenizer(texts)
        model = AutoModelForMaskedLM.from_config(small_modernbert(tokenizer))
    else:
        tokenizer, model = load_tokenizer(config.model), load_model(config.model, config.init)
    check_fit(tokenizer, model, config.model)
    limit = longest_input(tokenizer, model)
    if config.block_size > limit:
        raise UserError(
            f"--block-size {config.block_size} is over the limit of {config.model}, which takes "
            f"{limit} tokens at most"
        )
    return tokenizer, model.train()


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hub id or directory. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the libraries raise a dozen types here; the message says which
        raise UserError(_cannot_load("tokenizer", name, error)) from error


def load_model(name: str | Path, init: str = "pretrained") -> PreTrainedModel:
    """Load the masked-LM of a Hub id or directory in fp32, or build it with random weights.

    Raises UserError, also where weights are missing: they would silently start at random.
    """
    try:
        if init == "scratch":
            model_config = AutoConfig.from_pretrained(name)
            return AutoModelForMaskedLM.from_config(model_config, dtype=torch.float32)
        model, info = AutoModelForMaskedLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise UserError(_cannot_load("model", name, error)) from error
    if info["missing_keys"]:
        raise UserError(
            f"{name} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}: not a "
            "masked-language model, or one without its head"
        )
    return model


def _cannot_load(what: str, name: str | Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return f"cannot load a {what} from {name}: {reason[0] if reason else type(error).__name__}"


def check_fit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raise UserError unless the two can do masked-language modelling together."""
    if tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {name} has no mask token: choose another model")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"the tokenizer of {name} knows no words: its vocabulary file is missing")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its model only {rows} embeddings"
        )


def longest_input(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The most tokens that tokenizer and model take at once, special tokens included."""
    limits = [tokenizer.model_max_length]
    if (configured := getattr(model.config, "max_position_embeddings", None) or 0) > 0:
        limits.append(configured)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from padding_idx + 1: 514 rows hold 512 tokens.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    return min(limits)

"""Tokenizer and model: from the Hub, a directory, a checkpoint, or made on the spot."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mlm_scratch.config import BUNDLED, TrainConfig
from mlm_scratch.hf.small_modernbert import small_modernbert, train_tokenizer
from mlm_scratch.run.directory import RUN_JSON
from mlm_scratch.util.errors import UserError

# What models raise for inputs, or numbers of half precision, that they cannot take.
REFUSALS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
NO_LIMIT = 10**9  # a tokenizer that does not know how much its model takes says 10**30


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
    if model.config.is_encoder_decoder:  # it would be trained to write its input out again
        raise UserError(f"{config.model} has a decoder: choose an encoder-only model")
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
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the libraries raise a dozen types here; the message says which
        raise UserError(_cannot_load("tokenizer", name, error)) from error
    tokenizer.chat_template = None  # of no use here, and it is saved in files that it names itself
    return tokenizer


def load_model(
    name: str | Path, init: str = "pretrained", dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """Load the masked-LM of a Hub id or directory, or build it with random weights in fp32.

    dtype: of the weights; "auto" takes them as they were saved.

    Raises UserError, also where weights are missing: they would silently start at random.
    """
    try:
        if init == "scratch":
            model_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            return AutoModelForMaskedLM.from_config(model_config, dtype=torch.float32)
        model, info = AutoModelForMaskedLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(_cannot_load("model", name, error)) from error
    if info["missing_keys"]:
        raise UserError(
            f"{name} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}: not a "
            "masked-language model, or one without its head (--init scratch starts at random)"
        )
    return model


def _cannot_load(what: str, name: str | Path, error: Exception) -> str:
    if os.path.isfile(os.path.join(name, RUN_JSON)):
        return f"{name} is the directory of a run: name {name}/model, or one of its checkpoints"
    reason = str(error).strip().splitlines()
    return f"cannot load a {what} from {name}: {reason[0] if reason else type(error).__name__}"


def check_fit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str | Path) -> None:
    """Raise UserError unless the two can do masked-language modelling together."""
    if tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {name} has no mask token: choose another model")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"the tokenizer of {name} knows no words: its vocabulary file is missing")
    embeddings = getattr(model.get_input_embeddings(), "weight", None)  # (V, H)
    if not isinstance(embeddings, Tensor):
        raise UserError(f"{name} has no table of token embeddings: choose another model")
    if len(tokenizer) > (rows := len(embeddings)):
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its model only {rows} embeddings"
        )


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_no_nan(scores: Tensor) -> None:
    """Raise UserError where the softmax of a model's answer has a NaN."""
    if scores.isnan().any():
        raise UserError("the model answers with NaN: its weights are damaged, choose another")


def longest_input(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The most tokens that tokenizer and model take at once, special tokens included."""
    limits = [tokenizer.model_max_length, NO_LIMIT]
    if (configured := getattr(model.config, "max_position_embeddings", None) or 0) > 0:
        limits.append(configured)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)  # (positions, H)
        if name.endswith("position_embeddings") and isinstance(weight, Tensor):
            # RoBERTa and its kin count positions from padding_idx + 1: 514 rows hold 512 tokens.
            padding_idx = getattr(module, "padding_idx", None)
            limits.append(len(weight) - (0 if padding_idx is None else padding_idx + 1))
    return min(limits)

"""One sentence through the masking and the loss, keeping every intermediate value.

No training code is duplicated here: the masks come from the loader's Collator, the logits and the
sum of the losses from model.py. The loss and the probability of each single token, which training
never needs, are computed here from these logits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig, changed
from mlm_scratch.data.rows import tokenize
from mlm_scratch.hf.checks import in_eval_mode, sparse_head_works
from mlm_scratch.hf.encode import encode
from mlm_scratch.loader import Batch, Collator, TokenRows
from mlm_scratch.masking import IGNORE
from mlm_scratch.model import MaskedLM
from mlm_scratch.util.errors import UserError

TOP_K = 3
NOT_SELECTED = "—"


@dataclass
class Token:
    """What happens to one token of a row."""

    position: int
    id: int  # in the text
    special: bool
    label: int  # the id to predict, -100 if it is not selected
    seen: int  # the id that the model sees
    treatment: str  # "mask", "random", "keep", or "—" if it is not selected


@dataclass
class Prediction:
    """What the model predicts at one masked position."""

    token: Token
    loss: float  # nats
    probability: float  # of the label
    top: list[tuple[int, float]]  # the most probable ids, with their probabilities


@dataclass
class Trace:
    """A row, the predictions at its masked positions, and the sum of their losses."""

    tokens: list[Token]
    predictions: list[Prediction]
    loss_sum: float  # nats, from MaskedLM


@torch.no_grad()
def trace(
    model: MaskedLM, tokenizer: PreTrainedTokenizerBase, text: str, config: TrainConfig
) -> Trace:
    """Mask `text` as the first step of a run on it would, and predict, without dropout.

    Raises:
        UserError: a text without a token, too long or not UTF-8.
    """
    ids = encode(model.hf_model, tokenizer, [text])["input_ids"][0].tolist()
    if not text.strip() or set(ids) <= set(tokenizer.all_special_ids):
        raise UserError("there is no token to mask in the text: give a sentence")
    model.dense_head = not sparse_head_works(model)
    rows = row_of(text, tokenizer, config)
    collator = Collator(tokenizer, **config.masking.of_collator(), seed=config.optimization.seed)
    batch = collator(rows, np.arange(1))  # (1, T)
    tokens = follow_tokens(rows.tokens.tolist(), batch, collator)
    with in_eval_mode(model):
        on_device = batch.to(model.hf_model.device)
        logits, labels = (tensor.cpu() for tensor in model.masked_logits(on_device))
        loss_sum = model(on_device).item()
    masked = [token for token in tokens if token.label != IGNORE]
    logits, labels = logits[labels != IGNORE].float(), labels[labels != IGNORE]  # (N, V), (N,)
    probabilities = logits.softmax(dim=1)  # (N, V)
    losses = cross_entropy(logits, labels, reduction="none")  # (N,) nats
    predictions = []
    for number, token in enumerate(masked):
        best = probabilities[number].topk(TOP_K)
        predictions.append(
            Prediction(
                token,
                losses[number].item(),
                probabilities[number, token.label].item(),
                list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
            )
        )
    return Trace(tokens, predictions, loss_sum)


def row_of(text: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> TokenRows:
    """Tokenize a text into one row, truncated to config.text.block_size."""
    config = changed(config, grouping="lines")
    ((ids, gap_before),) = tokenize([text], tokenizer, config)
    return TokenRows(
        np.array(ids, np.int64),
        starts=np.array([0, len(ids)]),
        gap_before=np.array(gap_before, bool) if config.masking.whole_word else None,
    )


def follow_tokens(ids: list[int], batch: Batch, collator: Collator) -> list[Token]:
    """Reconstruct what happened to each token of a row from a batch of this row alone.

    The treatment is inferred from what the model sees: a random token that equals the original
    looks kept, and one that happens to be the mask token looks masked.
    """
    tokens = []
    row = zip(ids, batch.input_ids[0].tolist(), batch.labels[0].tolist(), strict=True)
    for position, (id, seen, label) in enumerate(row):
        treatment = NOT_SELECTED
        if label != IGNORE:
            treatment = "keep" if seen == label else "random"
            treatment = "mask" if seen == collator.mask_token_id else treatment
        tokens.append(Token(position, id, bool(collator.is_special[id]), label, seen, treatment))
    return tokens

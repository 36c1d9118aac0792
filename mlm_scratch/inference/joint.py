"""Several masks filled together, and whole sentences scored: what one softmax per mask cannot do.

The pipeline predicts each mask while the others are still masks, so "the <mask> of <mask>" gets two
good words that need not go together. Here one mask is filled at a time, and the next is predicted
with that word in its place. By the chain rule the product of these probabilities is that
of all the words together:

    p(a, b | rest) = p(a | rest) x p(b | a, rest)

Another order is another product: what a masked language model says of one word given the others
need not fit together to one distribution. And beam search may miss the best.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.encode import ask, encode, find_masks, find_words
from mlm_scratch.hf.load import check_no_nan
from mlm_scratch.util.errors import UserError

ORDERS = ("left to right", "most certain first")
LOGITS_AT_ONCE = 2**27  # rows x tokens x vocabulary: half a gigabyte
MOST_FILLS = 100


class JointFill(NamedTuple):
    """All masks of a text, filled."""

    score: float  # the product of the probabilities
    tokens: list[int]  # one per mask, in the order of the text
    sequence: str


@torch.no_grad()
def fill_jointly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    order: str,
    *,
    top_k: int = 5,
    beams: int = 16,
    truncate: bool = False,
) -> list[JointFill]:
    """Fill all masks of a text by beam search.

    Args:
        order: one of ORDERS: which mask comes next. The most certain one is that whose best token
            has the largest probability, in each beam by itself.
        top_k: how many fills to return, the most probable first.
        beams: how many partly filled texts are kept after each mask; top_k where that is more.

    Raises UserError for a text without a mask, too long or not UTF-8.
    """
    input_ids = encode(model, tokenizer, [text], truncate)["input_ids"]  # (1, T)
    mask_index = find_masks(tokenizer, input_ids[0], text)  # (M,)
    if not 1 <= top_k <= MOST_FILLS:
        raise UserError(f"top-k must be from 1 to {MOST_FILLS} for joint fills, got {top_k}")
    scores = torch.zeros(1)  # (beams,) log probabilities
    for _ in mask_index:
        is_mask = input_ids == tokenizer.mask_token_id  # (beams, T), as many in each
        at = is_mask.nonzero()[:, 1].view(len(input_ids), -1)  # (beams, those left)
        if order == "left to right":
            at = at[:, :1]  # (beams, 1)
        log_p = _log_probabilities(model, input_ids, at)  # (beams, those left or 1, V)
        log_p[..., tokenizer.mask_token_id] = -math.inf  # a mask is no answer to a mask
        row = torch.arange(len(input_ids))  # (beams,)
        chosen = log_p.amax(dim=2).argmax(dim=1)  # (beams,) the most certain
        candidates = scores[:, None] + log_p[row, chosen]  # (beams, V)
        count = min(max(beams, top_k), int(candidates.isfinite().sum()))
        scores, where = candidates.flatten().topk(count)  # (count,), (count,)
        beam, token = where // candidates.shape[1], where % candidates.shape[1]  # (count,) each
        input_ids = input_ids[beam]  # (count, T)
        input_ids[torch.arange(count), at[beam, chosen[beam]]] = token
    return [
        JointFill(
            math.exp(score),
            ids[mask_index].tolist(),
            str(tokenizer.decode(ids, skip_special_tokens=True)),
        )
        for ids, score in zip(input_ids[:top_k], scores[:top_k].tolist(), strict=True)
    ]


def _log_probabilities(model: PreTrainedModel, input_ids: Tensor, at: Tensor) -> Tensor:
    """(B, T) ids -> (B, M, V) at the M columns that `at`, (B, M), names for each row."""
    at_once = max(1, LOGITS_AT_ONCE // (input_ids.shape[1] * model.config.vocab_size))
    parts = []
    for rows, columns in zip(input_ids.split(at_once), at.split(at_once), strict=True):
        logits = ask(model, {"input_ids": rows})  # (rows, T, V)
        row = torch.arange(len(rows))[:, None]  # (rows, 1)
        parts.append(logits[row, columns].float().cpu())  # (rows, M, V)
    log_p = torch.cat(parts).log_softmax(dim=-1)  # (B, M, V)
    check_no_nan(log_p)
    return log_p


@torch.no_grad()
def score_sentence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    truncate: bool = False,
) -> list[tuple[int, float]]:
    """(id, log probability) of each token, special ones left out, when it alone is masked.

    Their sum is the pseudo-log-likelihood of the sentence, and e to the power of minus their mean
    its pseudo-perplexity (Salazar et al. 2020, Masked Language Model Scoring).

    Raises UserError for a text without a token, too long or not UTF-8.
    """
    (input_ids,) = encode(model, tokenizer, [text], truncate)["input_ids"]  # (T,)
    at = find_words(tokenizer, input_ids, text)  # (N,)
    masked_ids = input_ids.repeat(len(at), 1)  # (N, T), one row per token
    masked_ids[torch.arange(len(at)), at] = tokenizer.mask_token_id
    log_p = _log_probabilities(model, masked_ids, at[:, None])[:, 0]  # (N, V)
    scores = log_p.gather(1, input_ids[at, None])[:, 0]  # (N,)
    return list(zip(input_ids[at].tolist(), scores.tolist(), strict=True))

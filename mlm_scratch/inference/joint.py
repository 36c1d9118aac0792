"""Several masks filled together, which one softmax per mask cannot do.

The pipeline predicts each mask while the others are still masks, so "the <mask> of <mask>" gets two
good words that may not fit together. Here one mask is filled at a time, and the next mask is
predicted with that word in place. By the chain rule, the product of these conditionals is the joint
probability of all the words:

    p(a, b | rest) = p(a | rest) x p(b | a, rest)

A different order gives a different product: the conditionals of a masked language model need not be
consistent with one joint distribution. And beam search may miss the best fill.
"""

import math
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.encode import encode, find_masks, ids_without_token
from mlm_scratch.inference.score import log_probabilities
from mlm_scratch.util.errors import UserError

ORDERS = ("left to right", "most certain first")
MAX_FILLS = 100


class JointFill(NamedTuple):
    """All masks of a text, filled."""

    score: float  # the product of the probabilities
    tokens: list[int]  # one per mask, in the order of the text
    sequence: str


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
        model: a masked-LM, on any device.
        tokenizer: its tokenizer.
        text: text with one or more masks.
        order: one of ORDERS: which mask comes next. The most certain mask is the one whose best
            token has the largest probability, in each beam separately.
        top_k: how many fills to return, the most probable first.
        beams: how many partly filled texts to keep after each mask, but at least top_k.
        truncate: truncate a text that is too long instead of raising UserError.

    Raises:
        UserError: a text without a mask, too long or not UTF-8.
    """
    input_ids = encode(model, tokenizer, [text], truncate)["input_ids"]  # (1, T)
    mask_index = find_masks(tokenizer, input_ids[0], text)  # (M,)
    if not 1 <= top_k <= MAX_FILLS:
        raise UserError(f"top-k must be from 1 to {MAX_FILLS} for joint fills, got {top_k}")
    never = [tokenizer.mask_token_id, *ids_without_token(tokenizer, model.config.vocab_size)]
    scores = torch.zeros(1)  # (beams,) log probabilities
    for _ in mask_index:
        is_mask = input_ids == tokenizer.mask_token_id  # (beams, T), equally many in each
        at = is_mask.nonzero()[:, 1].view(len(input_ids), -1)  # (beams, masks left)
        if order == "left to right":
            at = at[:, :1]  # (beams, 1)
        log_p = log_probabilities(model, input_ids, at)  # (beams, masks left or 1, V)
        log_p[..., never] = -math.inf
        row = torch.arange(len(input_ids))  # (beams,)
        next_mask = log_p.amax(dim=2).argmax(dim=1)  # (beams,) the most certain
        candidates = scores[:, None] + log_p[row, next_mask]  # (beams, V)
        count = min(max(beams, top_k), int(candidates.isfinite().sum()))
        scores, where = candidates.flatten().topk(count)  # (count,), (count,)
        beam, token = where // candidates.shape[1], where % candidates.shape[1]  # (count,) each
        input_ids = input_ids[beam]  # (count, T)
        input_ids[torch.arange(count), at[beam, next_mask[beam]]] = token
    return [
        JointFill(
            math.exp(score),
            ids[mask_index].tolist(),
            str(tokenizer.decode(ids, skip_special_tokens=True)),
        )
        for ids, score in zip(input_ids[:top_k], scores[:top_k].tolist(), strict=True)
    ]

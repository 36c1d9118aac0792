"""Sentences that are filled again at each evaluation: what the model knows now.

There are two ways to write one:

"The Milky Way is a [spiral] galaxy."    the answer in brackets is masked
"The Milky Way is a <mask> galaxy."      no answer: only the best fill is shown
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.fill_mask import predict
from mlm_scratch.hf.encode import MASK_SPELLINGS, encode, find_masks, use_own_mask
from mlm_scratch.parallel.ranks import Ranks
from mlm_scratch.util.errors import UserError, shortened

BRACKETS = re.compile(r"\[([^][]+)\]")


@dataclass(frozen=True)
class Watched:
    """A sentence to watch.

    Attributes:
        text: as typed.
        masked: with a mask for each token of the answer.
        answer: as typed, "" if none is named.
        answer_ids: (M,) the ids of its tokens, one per mask.
    """

    text: str
    masked: str
    answer: str
    answer_ids: Tensor | None


def read_watched(
    texts: tuple[str, ...], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Watched]:
    """Turn sentences as typed into what is filled.

    Raises:
        UserError: one has no mask and no answer, or several answers; or the model cannot take it.
    """
    return [_read(text, model, tokenizer) for text in texts]


def _read(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Watched:
    own = use_own_mask(tokenizer, text)
    answers = [] if MASK_SPELLINGS.search(text) else list(BRACKETS.finditer(own))
    if not answers:
        (input_ids,) = encode(model, tokenizer, [own])["input_ids"]  # (T,)
        find_masks(tokenizer, input_ids, text)
        return Watched(text, own, "", None)
    if len(answers) > 1:
        raise UserError(f"--watch: name one answer in {shortened(text)}, not {len(answers)}")
    (match,) = answers
    before, answer, after = own[: match.start()], match[1], own[match.end() :]
    # The ids of the answer are those that the sentence itself has there.
    (ids,) = encode(model, tokenizer, [before + answer + after])["input_ids"]  # (T,)
    for count in range(1, len(ids)):
        masked = before + tokenizer.mask_token * count + after
        (masked_ids,) = encode(model, tokenizer, [masked])["input_ids"]  # (T',)
        is_mask = masked_ids == tokenizer.mask_token_id  # (T',)
        if len(masked_ids) == len(ids) and torch.equal(masked_ids[~is_mask], ids[~is_mask]):
            return Watched(text, masked, answer, ids[is_mask])
    raise UserError(
        f"--watch: {answer!r} is no word of its own for the tokenizer in {shortened(text)}: put "
        "spaces around it, or use <mask>"
    )


def fill_watched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    watched: list[Watched],
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """Fill the sentences, on rank 0 only. No random state moves.

    Returns:
        for each sentence {"text", "fill", "p"}, and {"answer", "answer_p"} if it has one. The
        probability of several tokens is their product, each predicted with all of them masked.
    """
    fills = []
    for each in watched if ranks.is_first else []:
        ((_, _, probabilities),) = predict(model, tokenizer, [each.masked])  # (M, V)
        best_p, best_ids = probabilities.max(dim=1)  # (M,), (M,)
        fill = {
            "text": each.text,
            "fill": str(tokenizer.decode(best_ids)).strip(),
            "p": best_p.prod().item(),
        }
        if each.answer_ids is not None:
            answer_p = probabilities.gather(1, each.answer_ids[:, None])  # (M, 1)
            fill |= {"answer": each.answer, "answer_p": answer_p.prod().item()}
        fills.append(fill)
    return fills


def watched_line(fill: dict[str, Any]) -> str:
    """Say what a sentence was filled with."""
    return f"    {fill['text']}  {short(fill)}"


def short(fill: dict[str, Any]) -> str:
    """Say the best fill and, where it is another one, the probability of the answer."""
    best = f"{fill['fill']} ({fill['p']:.2f})"
    if "answer" not in fill:
        return best
    if fill["fill"] == fill["answer"]:
        return f"{best}: right"
    return f"{best}, not {fill['answer']} ({fill['answer_p']:.4f})"

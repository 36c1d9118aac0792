"""Sentences that are filled again at each evaluation: what the model knows now.

There are two ways to write one:

"The Milky Way is a [spiral] galaxy."    the answer in brackets is masked
"The Milky Way is a <mask> galaxy."      no answer: only the best fill is shown
"""

import contextlib
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.encode import (
    MASK_SPELLINGS,
    encode,
    find_masks,
    logits_at,
    use_own_mask,
    visible_token,
)
from mlm_scratch.util.errors import UserError, shortened

BRACKETS = re.compile(r"\[([^][]+)\]")


@dataclass(frozen=True)
class Watched:
    """A sentence to watch.

    Attributes:
        text: as typed.
        input_ids: (T,) with masks.
        at: (M,) the positions of the masks.
        answer: as typed, "" if none is named.
        answer_ids: (M,) the ids of its tokens; None without an answer.
    """

    text: str
    input_ids: Tensor
    at: Tensor
    answer: str = ""
    answer_ids: Tensor | None = None


def read_watched(
    texts: tuple[str, ...], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Watched]:
    """Turn sentences as typed into what is filled.

    Raises:
        UserError: one has no mask and no answer, or several answers; or the model cannot take it.
    """
    return [_read(text, model, tokenizer) for text in texts]


def read_answerable(
    texts: tuple[str, ...], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Watched]:
    """Do the same, but leave out sentences whose answer is not a separate word to the tokenizer."""
    answerable = []
    for text in texts:
        with contextlib.suppress(UserError):
            answerable.append(_read(text, model, tokenizer))
    return answerable


def _read(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Watched:
    if not text.isprintable():
        raise UserError(f"--watch: {shortened(text)} is not printable text in one line")
    answers = [] if MASK_SPELLINGS.search(text) else list(BRACKETS.finditer(text))
    if not answers:
        (input_ids,) = encode(model, tokenizer, [use_own_mask(tokenizer, text)])["input_ids"]
        return Watched(text, input_ids, find_masks(tokenizer, input_ids, text))
    if len(answers) > 1:
        raise UserError(
            f"--watch: put one answer in brackets in {shortened(text)}, not {len(answers)}"
        )
    (match,) = answers
    before, inside, after = text[: match.start()], match[1], text[match.end() :]
    # Spaces inside the brackets are the answer's neighbours, unless there are some outside.
    inside = inside.lstrip() if not before or before[-1].isspace() else inside
    inside = inside if after[:1].isalnum() else inside.rstrip()
    answer = inside.strip()
    sentence = before + inside + after
    # The answer's own tokens are masked, as in training. To tokenize the sentence with masks in it
    # gives other ids: SentencePiece inserts a space after a mask.
    inputs = encode(model, tokenizer, [sentence])
    (input_ids,) = inputs["input_ids"]  # (T,)
    start = len(before) + len(inside) - len(inside.lstrip())
    at = _tokens_of(inputs, sentence, start, start + len(answer))  # (M,)
    if at is None:
        raise UserError(
            f"--watch: {answer!r} is not a separate word to this tokenizer in {shortened(text)}: "
            "put spaces around it, or use <mask>"
        )
    if tokenizer.unk_token_id in input_ids[at].tolist():
        raise UserError(f"--watch: {answer!r} is not in the vocabulary of this tokenizer")
    masked = input_ids.index_fill(0, at, tokenizer.mask_token_id)  # (T,)
    return Watched(text, masked, at, answer, input_ids[at])


def _tokens_of(inputs: BatchEncoding, text: str, start: int, end: int) -> Tensor | None:
    """Return the positions, (M,), of the tokens that make text[start:end]; None if none do."""
    if inputs.encodings is None:  # not a fast tokenizer
        return None
    at = []
    for position, (first, last) in enumerate(inputs.encodings[0].offsets):
        if last > start and first < end and last > first:
            if text[first:start].strip() or last > end:  # it holds more than the answer
                return None
            at.append(position)
    return torch.tensor(at) if at else None


def fill_watched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    watched: list[Watched],
) -> list[dict[str, Any]]:
    """Fill the sentences. No random state moves.

    Returns:
        for each sentence {"text", "fill", "p"}, and {"answer", "answer_p", "right"} if it has one:
        right if the ids of the fill are the answer's, however both are spelled. The probability of
        several tokens is their product, each predicted with all of them masked. A model that
        outputs NaN fills nothing: "fill" is "", and the numbers are NaN.
    """
    fills = []
    for each in watched:
        (logits,) = logits_at(model, each.input_ids[None], each.at[None])  # (M, V)
        probabilities = logits.softmax(dim=-1)  # (M, V)
        best_p, best_ids = probabilities.max(dim=1)  # (M,), (M,)
        is_lost = bool(best_p.isnan().any())  # the loop decides whether the run goes on
        fill = {
            "text": each.text,
            "fill": "" if is_lost else _spelled(tokenizer, best_ids),
            "p": best_p.prod().item(),
        }
        if each.answer_ids is not None:
            answer_p = probabilities.gather(1, each.answer_ids[:, None])  # (M, 1)
            right = not is_lost and torch.equal(best_ids, each.answer_ids)
            fill |= {"answer": each.answer, "answer_p": answer_p.prod().item(), "right": right}
        fills.append(fill)
    return fills


def _spelled(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """Decode a fill, (M,); where that leaves nothing to see, name its tokens."""
    text = str(tokenizer.decode(ids)).strip()
    return text or " ".join(visible_token(id, tokenizer) for id in ids.tolist())


def before_and_after(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (sentence, its first fill, its last) of Report.results.

    The first is "" for a sentence that is watched since a resume only.
    """
    before = {fill["text"]: short(fill) for fill in results["before"].get("watch", [])}
    after = results["after"].get("watch", [])
    return [(fill["text"], before.get(fill["text"], ""), short(fill)) for fill in after]


def watched_line(fill: dict[str, Any]) -> str:
    """Format a sentence and its fill."""
    return f"    {fill['text']}  {short(fill)}"


def short(fill: dict[str, Any]) -> str:
    """Format the best fill and, if that is not the answer, the probability of the answer."""
    if math.isnan(fill["p"]):
        return "no fill: the model outputs NaN"
    best = f"{fill['fill']} ({fill['p']:.2f})"
    if "answer" not in fill:
        return best
    if fill["right"]:
        return f"{best}: right"
    return f"{best}, not {fill['answer']} ({fill['answer_p']:.4f})"

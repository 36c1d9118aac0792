"""Minimal pairs: how often a model finds the good sentence more probable than the bad one.

    good                             bad                              phenomenon
    The capital of Italy is Rome.    The capital of Italy is Paris.   facts
    A triangle has three sides.      A triangle have three sides.     number agreement

Source of the test and of its file format: Warstadt et al. 2020, BLiMP.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.data.tables import KINDS, kind_of, read_table
from mlm_scratch.hf.encode import encode, find_words
from mlm_scratch.inference.score import score_sentence
from mlm_scratch.util.errors import UserError, shortened
from mlm_scratch.util.intervals import wilson_interval
from mlm_scratch.util.progress import progress_bar

# What the columns may be called, in any case of letters; the second name is BLiMP's.
NAMES = (("good", "sentence_good"), ("bad", "sentence_bad"), ("phenomenon", "uid"))

TIE = 1e-5  # nats: what rounding leaves between equal scores


class Pair(NamedTuple):
    """Two sentences that differ in one thing."""

    good: str
    bad: str
    phenomenon: str = "all pairs"


def read_pairs(path: str) -> list[Pair]:
    """Read pairs from a table (data/tables.py); a header line is optional.

    Raises:
        UserError: the file cannot be read; the message names the line.
    """
    try:
        known = [name for names in NAMES[:2] for name in names]
        rows = [*read_table(path, [names[0] for names in NAMES], header=known)]
        pairs = [_pair(path, number, values) for number, values in rows]
        unnamed = rows[:1] if kind_of(path, KINDS) in ("csv", "tabs") else []
        if any(n == 1 and all(map(str.isidentifier, row.values())) for n, row in unnamed):
            raise UserError(
                f"the first line of {path} looks like names of columns, of which none is known: "
                f"use {_expected()}"
            )
    except UserError as error:
        raise UserError(f"--pairs: {error}") from error
    if not pairs:
        raise UserError(f"--pairs: {path} has no pairs")
    return pairs


def _pair(path: str, number: int, values: dict[str, str]) -> Pair:
    by_name = {name.strip().lower(): value for name, value in values.items()}
    good, bad, phenomenon = (
        next((by_name[name] for name in known if name in by_name), None) for known in NAMES
    )
    if good is None or bad is None:
        found = ", ".join(values) or "nothing"
        raise UserError(
            f"line {number} of {path} has no good and bad sentence, but {found}: name the columns "
            f"{_expected()}"
        )
    return Pair(good, bad) if phenomenon is None else Pair(good, bad, phenomenon)


def _expected() -> str:
    needed = " and ".join(" or ".join(names) for names in NAMES[:2])
    return f"{needed}, perhaps with {' or '.join(NAMES[2])}"


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    method: str,
    truncate: bool = False,
) -> dict[str, list[float]]:
    """Return for each phenomenon the score of each pair's good sentence minus that of its bad one.

    Raises:
        UserError: a sentence cannot be scored; this is checked before any scoring, and the message
            quotes the sentence.
    """
    for pair in pairs:
        for text in pair[:2]:
            (input_ids,) = encode(model, tokenizer, [text], truncate)["input_ids"]
            find_words(tokenizer, input_ids, text)
    gains: dict[str, list[float]] = defaultdict(list)
    for pair in progress_bar(pairs, desc="scoring", unit=" pairs", leave=False):
        good, bad = (
            sum(p for _, p in score_sentence(model, tokenizer, text, truncate, method))
            for text in (pair.good, pair.bad)
        )
        gains[pair.phenomenon].append(good - bad)
    return gains


def lines_of(gains: dict[str, list[float]]) -> Iterator[str]:
    """Yield the lines of a table: one per phenomenon, and one for all pairs. A tie is not right."""
    rows = [(shortened(name)[1:-1], of_pairs) for name, of_pairs in gains.items()]
    if len(rows) > 1:
        rows.append(("all", [gain for _, of_pairs in rows for gain in of_pairs]))
    width = max(len(name) for name, _ in [*rows, ("phenomenon", [])])
    yield f"{'phenomenon':<{width}}  right  ties    of  share  95 % interval"
    for name, of_pairs in rows:
        n, ties = len(of_pairs), sum(abs(gain) < TIE for gain in of_pairs)
        right = sum(gain >= TIE for gain in of_pairs)
        low, high = wilson_interval(right, n)
        yield (
            f"{name:<{width}}  {right:>5}  {ties:>4}  {n:>4}  {right / n:.3f}  "
            f"{low:.3f} to {high:.3f}"
        )

"""Minimal pairs: how often a model finds the good sentence more probable than the bad one.

    good                             bad                              phenomenon
    The capital of Italy is Rome.    The capital of Italy is Paris.   facts
    A triangle has three sides.      A triangle have three sides.     number agreement

Source of the test and of its file format: Warstadt et al. 2020, BLiMP.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.encode import encode, find_words
from mlm_scratch.inference.score import score_sentence
from mlm_scratch.util.errors import UserError, shortened
from mlm_scratch.util.intervals import wilson_interval
from mlm_scratch.util.progress import progress_bar

# What the columns may be called; the second name is BLiMP's.
NAMES = (("good", "sentence_good"), ("bad", "sentence_bad"), ("phenomenon", "UID"))


class Pair(NamedTuple):
    """Two sentences that differ in one thing."""

    good: str
    bad: str
    phenomenon: str = "all pairs"


def read_pairs(path: str) -> list[Pair]:
    """Read pairs from a .jsonl file or a tab-separated file, with or without a header line.

    Raises:
        UserError: the file cannot be read; the message names the line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = _json_rows(file) if path.endswith((".jsonl", ".json")) else _tab_rows(file)
            pairs = [_pair(path, number, row) for number, row in rows]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--pairs: cannot read {path}: {error}") from error
    except ValueError as error:
        raise UserError(f"--pairs: {path}: {error}") from error
    if not pairs:
        raise UserError(f"--pairs: {path} has no pairs")
    return pairs


def _json_rows(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            yield number, row


def _tab_rows(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    names = [known[0] for known in NAMES]
    for number, line in enumerate(file, start=1):
        cells = line.rstrip("\n").split("\t")
        if number == 1 and {"good", "sentence_good"} & set(cells):
            names = cells
        elif line.strip():
            yield number, dict(zip(names, cells, strict=False))


def _pair(path: str, number: int, row: dict[str, Any]) -> Pair:
    values = [next((row[name] for name in known if row.get(name)), None) for known in NAMES]
    good, bad, phenomenon = values
    if not (isinstance(good, str) and isinstance(bad, str) and good.strip() and bad.strip()):
        raise UserError(f"--pairs: line {number} of {path} has no good and bad sentence")
    return Pair(good, bad) if phenomenon is None else Pair(good, bad, str(phenomenon))


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    method: str,
    truncate: bool = False,
) -> dict[str, list[bool]]:
    """Return for each phenomenon whether the good sentence of each pair scores higher.

    Raises:
        UserError: a sentence cannot be scored; this is checked before any scoring, and the message
            quotes the sentence.
    """
    for pair in pairs:
        for text in pair[:2]:
            (input_ids,) = encode(model, tokenizer, [text], truncate)["input_ids"]
            find_words(tokenizer, input_ids, text)
    right: dict[str, list[bool]] = defaultdict(list)
    for pair in progress_bar(pairs, desc="scoring", unit=" pairs", leave=False):
        good, bad = (
            sum(p for _, p in score_sentence(model, tokenizer, text, truncate, method))
            for text in (pair.good, pair.bad)
        )
        right[pair.phenomenon].append(good > bad)
    return right


def lines_of(right: dict[str, list[bool]]) -> Iterator[str]:
    """Yield the lines of a table: one per phenomenon, and one for all pairs."""
    rows = [(shortened(name)[1:-1], ones) for name, ones in right.items()]
    if len(rows) > 1:
        rows.append(("all", [one for _, ones in rows for one in ones]))
    width = max(len(name) for name, _ in [*rows, ("phenomenon", [])])
    yield f"{'phenomenon':<{width}}  right    of  share  95 % interval"
    for name, ones in rows:
        low, high = wilson_interval(sum(ones), len(ones))
        yield (
            f"{name:<{width}}  {sum(ones):>5}  {len(ones):>4}  {sum(ones) / len(ones):.3f}  "
            f"{low:.3f} to {high:.3f}"
        )

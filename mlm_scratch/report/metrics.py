"""metrics.jsonl: its lines, read, cut back at a resume, and put together."""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlm_scratch.evaluate import perplexity

METRICS = "metrics.jsonl"
TRAINING = "training"  # name of a curve


def epoch_of(step: int, steps_per_epoch: int) -> float:
    """Return the epochs done after `step` steps, added up and hence rounded as in Trainer."""
    if step == 0:
        return 0.0
    epoch, step_of_epoch = divmod(step - 1, steps_per_epoch)
    return epoch + (step_of_epoch + 1) / steps_per_epoch


def drop_later_lines(last_step: int, last_evaluation: int, metrics: Path) -> None:
    """Truncate the file where lines of later steps begin, or at an unfinished line."""
    metrics.touch()
    kept = 0
    with metrics.open("rb+") as file:
        for line in file:
            if _is_later(line, last_step, last_evaluation):
                break  # an unreadable line ends the file, too
            kept += len(line)
        file.truncate(kept)


def _is_later(line: bytes, last_step: int, last_evaluation: int) -> bool:
    try:
        values = json.loads(line)
        last = last_evaluation if values.keys() & {"eval_loss", "watch"} else last_step
        return not line.endswith(b"\n") or values["step"] > last
    except (ValueError, KeyError, TypeError, RecursionError):
        if line.endswith(b"\n"):  # else a kill interrupted the write
            print(
                f"warning: {METRICS}: dropped from the first unreadable line on: {line[:40]!r}",
                file=sys.stderr,
            )
        return True


def as_json(values: Any, **options: Any) -> str:
    """Serialize numbers and texts. JSON has no NaN and no infinity: they become null."""
    return json.dumps(_finite(values), allow_nan=False, **options)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl; null becomes the number that it stands for."""

    def numbers(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return an object of JSON."""
        values = {name: math.nan if value is None else value for name, value in pairs}
        if "eval_loss" in values:
            values["perplexity"] = perplexity(values["eval_loss"])
        for text in other_texts(values):
            values[f"eval_{text}_perplexity"] = perplexity(values[f"eval_{text}_loss"])
        return values

    with (run_dir / METRICS).open(encoding="utf-8") as file:
        return [json.loads(line, object_pairs_hook=numbers) for line in file]


def evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each evaluation with its fills, which have a line of their own, in the order made."""
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line.keys() & {"eval_loss", "watch"}:
            merged[line["step"]] = merged.get(line["step"], {}) | line
    return [*merged.values()]


def other_texts(values: Iterable[str]) -> list[str]:
    """Name the texts of an evaluation other than the first, given the names of its values."""
    found = (re.fullmatch("eval_(.+)_loss", name) for name in values)
    return [match[1] for match in found if match]


def lowest(losses: dict[int, float]) -> int | None:
    """Return the step with the lowest loss, the first of equal ones; None if none is finite."""
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], step), default=None)


def loss_curves(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, loss) of training, and of each text that is evaluated on."""
    texts = dict.fromkeys(text for line in lines for text in other_texts(line))
    names = {TRAINING: "loss", "evaluation": "eval_loss"}
    names |= {f"evaluation, {text}": f"eval_{text}_loss" for text in texts}
    return {
        label: [(line["step"], line[name]) for line in lines if name in line]
        for label, name in names.items()
    }


def answer_curves(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return for each watched sentence (step, probability of its answer, or else of its fill)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for fill in line.get("watch", []):
            point = line["step"], fill.get("answer_p", fill["p"])
            curves.setdefault(fill["text"], []).append(point)
    return curves

"""What a finished run leaves behind: model/ with a model card, results.json, report.html."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mlm_scratch.hf.checks import weights_are_finite
from mlm_scratch.hf.load import load_model
from mlm_scratch.hf.new_words import how_to_load
from mlm_scratch.report.card import command_line, model_card, settings
from mlm_scratch.report.first_row import first_row_lines
from mlm_scratch.report.log import Report, answers_line, summary
from mlm_scratch.report.metrics import as_json, lowest, read_metrics
from mlm_scratch.report.page import report_page
from mlm_scratch.report.picture import PICTURE, draw_losses
from mlm_scratch.report.watch import Watched, before_and_after, fill_watched
from mlm_scratch.run.checkpoint import save_model
from mlm_scratch.run.state import Training
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.files import write_text
from mlm_scratch.util.runs import MODEL, find_fault

RESULTS, PAGE = "results.json", "report.html"


def leave_behind(t: Training, report: Report) -> None:
    """Write all of it, on rank 0, and print what has been achieved.

    Raises:
        UserError: the weights are NaN or infinite.
    """
    if t.steps_done < t.total_steps:
        print(
            f"step {t.steps_done} of {t.total_steps} was the last: no lower evaluation loss in "
            f"{t.config.evaluation.patience} evaluations"
        )
    if nonfinite := t.losses.nonfinite.item():
        print(
            f"warning: {nonfinite} of {t.steps_done} steps had a NaN or infinite loss: "
            f"{t.losses.advice()}",
            file=sys.stderr,
        )
    try:
        # First of all: whatever fails later, the model is there.
        final_step, hf_model = _save_final_model(t)
    finally:
        draw_losses(t.run_dir)  # also of a run whose weights are lost: it shows where
    results, lines = report.results(final_step), read_metrics(t.run_dir)
    results["answers"] = {
        group: _right_of(hf_model, t, asked) for group, asked in t.answers.items()
    }
    if results["steps"] == 0:  # a finished run, resumed
        results |= _time_and_speed_before(t.run_dir)
    advice = how_to_load(t.tokenizer) if t.config.model.add_tokens else ""
    card = model_card(t.config, t.labels, t.loader.rows_per_step, results, lines, advice)
    (t.run_dir / MODEL / "README.md").write_text(card, encoding="utf-8")
    shutil.copy(t.run_dir / PICTURE, t.run_dir / MODEL)
    write_text(t.run_dir / RESULTS, as_json(results, indent=2))
    page = report_page(
        t.run_dir.resolve().name,
        lines,
        results,
        [line for line in (summary(results), answers_line(results)) if line],
        [*first_row_lines(t.source, t.loader.rows_per_step, t.tokenizer, t.config)],
        {"read": t.labels, **settings(t.config)},
        command_line(t.config),
    )
    write_text(t.run_dir / PAGE, page)
    _print_outcome(results, advice)


def _right_of(hf_model: PreTrainedModel, t: Training, asked: list[Watched]) -> tuple[int, int]:
    """Count the sentences whose answer the model finds, and all of them."""
    return sum(fill["right"] for fill in fill_watched(hf_model, t.tokenizer, asked)), len(asked)


def _print_outcome(results: dict[str, Any], advice: str) -> None:
    print(summary(results))
    if line := answers_line(results):
        print(line)
    if advice:
        print(f"new words: {advice}")
    if fills := before_and_after(results):
        before, after = results["before"]["step"], results["after"]["step"]
        print(f"fills after {before:,} steps, and after {after:,}:")
        print(*(f"    {text}  {first}  ->  {last}" for text, first, last in fills), sep="\n")


def _time_and_speed_before(run_dir: Path) -> dict[str, Any]:
    """Return those of the process that ran the last steps, as far as they are known."""
    try:
        old = json.loads((run_dir / RESULTS).read_text(encoding="utf-8"))
        return {name: old[name] for name in ("steps", "seconds", "tokens_per_second")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _save_final_model(t: Training) -> tuple[int, PreTrainedModel]:
    """Write model/: of the last step, or with --best the best. Returns its step and the model."""
    best_step = _best_step(t) if t.config.evaluation.best else None
    if best_step is not None and best_step < t.steps_done:
        checkpoint, loss = t.run_dir / f"checkpoint-{best_step}", t.evaluations[best_step]
        print(f"model/ is that of {checkpoint.name}: the lowest evaluation loss, {loss:.4f}")
        hf_model = load_model(checkpoint)
        save_model(t.run_dir / MODEL, hf_model, hf_model.state_dict(), t.tokenizer)
        return best_step, hf_model
    weights = t.saver.readable(t.vocabulary.weights(t.hf_model))
    if not weights_are_finite(t.hf_model):  # read from the GPU, so the copies are complete
        raise UserError(
            f"the weights are NaN or infinite after step {t.steps_done}: there is no model to "
            f"save; {t.losses.advice()}"
        )
    save_model(t.run_dir / MODEL, t.hf_model, weights, t.tokenizer)
    return t.steps_done, t.hf_model


def _best_step(t: Training) -> int | None:
    """Return the step with the lowest evaluation loss whose checkpoint is intact."""
    losses = dict(t.evaluations)
    while (step := lowest(losses)) is not None:
        checkpoint = t.run_dir / f"checkpoint-{step}"
        if not checkpoint.is_dir():
            print(f"warning: {checkpoint.name}, the best, was not kept", file=sys.stderr)
        elif fault := find_fault(checkpoint):
            print(f"warning: {checkpoint.name}, the best, is damaged ({fault})", file=sys.stderr)
        else:
            return step
        del losses[step]
    return None

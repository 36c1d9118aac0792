"""What a finished run leaves behind: model/ with a model card, results.json, report.html."""

import json
import sys

from transformers import PreTrainedModel

from mlm_scratch.hf.checks import weights_are_finite
from mlm_scratch.hf.load import load_model
from mlm_scratch.run.card import command_line, model_card, settings
from mlm_scratch.run.checkpoint import save_model
from mlm_scratch.run.first_row import first_row_lines
from mlm_scratch.run.metrics import PICTURE, NoReport, lowest, read_metrics
from mlm_scratch.run.page import report_page
from mlm_scratch.run.state import Training
from mlm_scratch.run.stream_loader import StreamLoader
from mlm_scratch.run.watch import short, watched_line
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.runs import MODEL, find_fault

RESULTS, PAGE = "results.json", "report.html"


def leave_behind(t: Training, report: NoReport) -> None:
    """Write all of it, on rank 0, and print what has been achieved.

    Raises:
        UserError: the weights are NaN or infinite.
    """
    if t.steps_done < t.total_steps:
        print(
            f"step {t.steps_done} of {t.total_steps} was the last: no lower evaluation loss in "
            f"{t.config.patience} evaluations"
        )
    if nonfinite := t.losses.nonfinite.item():
        print(f"warning: {nonfinite} steps had a NaN or infinite loss", file=sys.stderr)
    hf_model, final_step = _final_model(t)
    results = report.results(final_step)
    lines = read_metrics(t.run_dir)
    card = model_card(t.config, t.sources, t.loader.rows_per_step, results, lines)
    picture = (t.run_dir / PICTURE).read_bytes()
    weights = t.saver.readable(t.vocabulary.weights(hf_model))
    save_model(
        t.run_dir / MODEL,
        hf_model,
        weights,
        t.tokenizer,
        beside={"README.md": card.encode(), PICTURE: picture},
    )
    (t.run_dir / RESULTS).write_text(json.dumps(results, indent=2), encoding="utf-8")
    page = report_page(
        t.run_dir.name,
        lines,
        results,
        report.summary(results),
        []
        if isinstance(t.loader, StreamLoader)
        else [*first_row_lines(t.loader, t.tokenizer, t.config)],
        {**t.sources, **settings(t.config)},
        command_line(t.config),
    )
    (t.run_dir / PAGE).write_text(page, encoding="utf-8")
    print(report.summary(results))
    _print_fills(results)


def _final_model(t: Training) -> tuple[PreTrainedModel, int]:
    """Return the model of the last step, or with --best the best one, and its step."""
    best_step = _best_step(t) if t.config.best else None
    if best_step is not None and best_step < t.steps_done:
        checkpoint, loss = t.run_dir / f"checkpoint-{best_step}", t.evaluations[best_step]
        print(f"model/ is that of {checkpoint.name}: the lowest evaluation loss, {loss:.4f}")
        return load_model(checkpoint), best_step
    if not weights_are_finite(t.hf_model):
        raise UserError(
            f"the weights are NaN or infinite after step {t.steps_done}: there is no model to "
            "save; begin a new run with a lower --lr or --weight-decay"
        )
    return t.hf_model, t.steps_done


def _best_step(t: Training) -> int | None:
    """Return the step with the lowest evaluation loss whose checkpoint is intact."""
    losses = dict(t.evaluations)
    while (step := lowest(losses)) is not None:
        checkpoint = t.run_dir / f"checkpoint-{step}"
        fault = find_fault(checkpoint) if checkpoint.is_dir() else "it is missing"
        if fault is None:
            return step
        print(f"warning: {checkpoint.name}, the best, is damaged ({fault})", file=sys.stderr)
        del losses[step]
    return None


def _print_fills(results: dict) -> None:
    before, after = results["before"], results["after"]
    if after.get("watch") and before["step"] < after["step"]:
        print(f"fills after {before['step']:,} steps, and after {after['step']:,}:")
        for first, last in zip(before["watch"], after["watch"], strict=True):
            print(f"{watched_line(first)}  ->  {short(last)}")

"""The numbers of a run: summed on the device, then to metrics.jsonl, TensorBoard and loss.png."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mlm_scratch.loader import Step
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.run.flops import Utilization
from mlm_scratch.run.watch import watched_line
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.progress import progress_bar

METRICS = "metrics.jsonl"
PICTURE = "loss.png"
MAX_NONFINITE_STEPS = 10  # after 10 non-finite losses in a row the weights are beyond repair


class LossMeter:
    """Sums of the losses of a run, on the device: reading one makes the CPU wait for the GPU."""

    def __init__(self, device: torch.device, log_every: int, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.check_every = min(log_every, MAX_NONFINITE_STEPS)
        self.sum = torch.zeros((), device=device)  # () losses since the last log
        self.steps = 0  # since the last log, those with masked tokens
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)  # () steps of the run
        self.nonfinite_in_a_row = torch.zeros_like(self.nonfinite)  # () up to the last step

    def add(self, loss: Tensor, n_masked: int) -> None:
        """Add the loss of a step, (), this rank's part of it, without reading it."""
        self.ranks.all_reduce_sum(loss)
        self.steps += n_masked > 0
        self.sum += loss
        nonfinite = ~loss.isfinite()  # ()
        self.nonfinite += nonfinite
        self.nonfinite_in_a_row += nonfinite
        self.nonfinite_in_a_row *= nonfinite

    def take_mean(self) -> float:
        """Return the mean loss since the last log; synchronizes with the GPU, once per log_every.

        0 if no step had a masked token.
        """
        loss = self.sum.item() / max(self.steps, 1)
        self.sum.zero_()
        self.steps = 0
        return loss

    def stop_if_diverged(self, step: int) -> None:
        """Raise UserError after MAX_NONFINITE_STEPS non-finite losses in a row.

        Looks only every `check_every` steps, since reading synchronizes with the GPU.
        """
        if step % self.check_every > 0:
            return
        if (nonfinite := self.nonfinite_in_a_row.item()) >= MAX_NONFINITE_STEPS:
            raise UserError(
                f"the loss was NaN or infinite in the last {nonfinite} steps, up to step {step}; "
                "earlier checkpoints are kept: begin a new run with a lower --lr, or with "
                "--precision bf16 or fp32 instead of fp16"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, under the names that they have in checkpoints."""
        return {
            "steps_since_log": self.steps,
            "loss_since_log": self.sum,
            "lost_in_a_row": self.nonfinite_in_a_row,
            "lost_steps": self.nonfinite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums that `state_dict` returned."""
        self.steps = state["steps_since_log"]
        self.sum.copy_(state["loss_since_log"])
        self.nonfinite_in_a_row.copy_(state["lost_in_a_row"])
        self.nonfinite.copy_(state["lost_steps"])


class Pace:
    """How fast steps go from now on."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.steps = self.tokens = 0
        self.at_peak = 0.0  # seconds that they would take at the device's peak

    def add(self, tokens: int, at_peak: float) -> None:
        """Count a step."""
        self.steps += 1
        self.tokens += tokens
        self.at_peak += at_peak

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.perf_counter() - self.begun

    def speed(self) -> dict[str, float]:
        """Return tokens (without padding) per second, and the MFU if it is known."""
        seconds = self.seconds()
        mfu = {"mfu": self.at_peak / seconds} if self.at_peak else {}
        return {"tokens_per_second": self.tokens / seconds, **mfu}

    def __str__(self) -> str:
        return shown_speed(self.speed())


def shown_speed(speed: Mapping[str, float]) -> str:
    """Say what Pace.speed returned."""
    mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
    return f"{speed['tokens_per_second']:,.0f} tokens/s{mfu}"


class NoReport:
    """The report of every rank but the first: it ignores what rank 0 writes down."""

    def close(self) -> None:
        """Finish the bar and the files. Harmless if called twice."""

    def advance(self, step: Step) -> None:
        """Count one optimizer step."""

    def log(self, step: int, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Log the mean loss since the last log, and the rate and the gradient norm of this step."""

    def evaluation(self, step: int, values: dict[str, float], fills: list[dict[str, Any]]) -> None:
        """Log and print the result of an evaluation: metrics, and fills of watched sentences."""

    def sync(self) -> None:
        """Flush all lines so far to the disk: a checkpoint must not outlive them."""

    def results(self, final_step: int) -> dict[str, Any]:
        """Return the final numbers."""
        return {}


class Report(NoReport):
    """Writes the metrics of a run as it goes. Use as a context manager.

    metrics.jsonl has no clock times, so that equal runs have equal files; the speed goes to the
    progress bar and to TensorBoard only.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        total_steps: int,
        steps_per_epoch: int,
        evaluated_at: int = -1,
        utilization: Utilization | None = None,
    ):
        """Open the files of `run_dir`.

        Args:
            run_dir: the run directory.
            first_step: steps done so far; later lines of an interrupted run are dropped, because
                they will be logged again.
            total_steps: the length of the run.
            steps_per_epoch: optimizer steps per epoch.
            evaluated_at: steps done at the last evaluation, -1 before the first; later evaluations
                are dropped, too.
            utilization: knows what a step costs, to tell the MFU.
        """
        self.steps_per_epoch, self.utilization = steps_per_epoch, utilization
        _drop_later_lines(first_step, evaluated_at, run_dir / METRICS)
        self.metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        self.board = SummaryWriter(run_dir / "logs", purge_step=first_step + 1)
        self.bar = progress_bar(
            total=total_steps, initial=first_step, desc="training", unit=" steps"
        )
        self.lap, self.whole = Pace(), Pace()  # since the last log line, of this process

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar and the files."""
        self.bar.close()
        self.board.close()
        self.metrics.close()

    def advance(self, step: Step) -> None:
        """Move the bar."""
        self.bar.update()
        at_peak = self.utilization.seconds_at_peak(step) if self.utilization else 0.0
        self.lap.add(step.n_tokens, at_peak)
        self.whole.add(step.n_tokens, at_peak)

    def log(self, step: int, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Write a line of training metrics, with the speed outside metrics.jsonl."""
        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        self._write(step, values)
        for name, value in {**values, **self.lap.speed()}.items():
            self.board.add_scalar(f"train/{name}", value, step)
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.2e}, {self.lap}", refresh=False
        )
        self.lap = Pace()

    def evaluation(self, step: int, values: dict[str, float], fills: list[dict[str, Any]]) -> None:
        """Write a line of evaluation metrics and one of fills, and print both."""
        lines = []
        if values:
            self._write(step, values)
            lines = [
                f"step {step}: eval loss {values['eval_loss']:.4f}, perplexity "
                f"{values['perplexity']:.2f}, accuracy {values['eval_accuracy']:.3f}"
            ]
        if fills:
            self._write(step, {"watch": fills})
            lines = (lines or [f"step {step}:"]) + [watched_line(fill) for fill in fills]
        for name, value in values.items():
            self.board.add_scalar(f"eval/{name.removeprefix('eval_')}", value, step)
        for fill in fills:
            self.board.add_scalar(f"watch/{fill['text']}", fill.get("answer_p", fill["p"]), step)
        with tqdm.external_write_mode():
            print(*lines, sep="\n", flush=True)
        self.lap = Pace()  # an evaluation is not training time

    def sync(self) -> None:
        """Call fsync on metrics.jsonl."""
        os.fsync(self.metrics.fileno())

    def results(self, final_step: int) -> dict[str, Any]:
        """Return the final numbers: those of the first evaluation and of the one of `final_step`.

        Time and speed are those of this process.
        """
        lines = read_metrics(Path(self.metrics.name).parent)
        losses = [line["loss"] for line in lines if "loss" in line]
        evaluated = [line for line in evaluations(lines) if line["step"] <= final_step]
        return {
            "step": final_step,
            "before": evaluated[0] if evaluated else {},
            "after": evaluated[-1] if evaluated else {},
            "training_loss": losses[-1] if losses else None,
            "steps": self.whole.steps,
            "seconds": self.whole.seconds(),
            **self.whole.speed(),
        }

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, "epoch": epoch_of(step, self.steps_per_epoch), **values}
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()


def epoch_of(step: int, steps_per_epoch: int) -> float:
    """Return the epochs done after `step` steps, added up and hence rounded as in Trainer."""
    if step == 0:
        return 0.0
    epoch, step_of_epoch = divmod(step - 1, steps_per_epoch)
    return epoch + (step_of_epoch + 1) / steps_per_epoch


def _drop_later_lines(last_step: int, last_evaluation: int, metrics: Path) -> None:
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


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl."""
    with (run_dir / METRICS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def summary(results: dict[str, Any]) -> str:
    """Say time, speed, and what the perplexity was before, of what Report.results returned."""
    duration = tqdm.format_interval(results["seconds"])
    line = f"{results['steps']:,} steps in {duration}, {shown_speed(results)} with evaluations"
    before, after = results["before"], results["after"]
    if "perplexity" in before and "perplexity" in after and before["step"] < after["step"]:
        line += f"; perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f}"
    return line


def evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each evaluation with its fills, which have a line of their own, in the order made."""
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line.keys() & {"eval_loss", "watch"}:
            merged[line["step"]] = merged.get(line["step"], {}) | line
    return [*merged.values()]


def lowest(losses: dict[int, float]) -> int | None:
    """Return the step with the lowest loss, the first of equal ones; None if none is finite."""
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], step), default=None)


def answer_curves(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return for each watched sentence (step, probability of its answer, or else of its fill)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for fill in line.get("watch", []):
            point = line["step"], fill.get("answer_p", fill["p"])
            curves.setdefault(fill["text"], []).append(point)
    return curves


def draw_losses(run_dir: Path) -> None:
    """Draw loss.png from metrics.jsonl: the losses over the steps, and the watched sentences."""
    import matplotlib  # half a second to import, needed once, at the very end

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run_dir)
    watched = answer_curves(lines)
    rows, height = (2, 7.5) if watched else (1, 4.5)
    figure, panels = pyplot.subplots(
        rows, figsize=(8, height), layout="constrained", sharex=True, squeeze=False
    )
    losses = panels[0, 0]
    for name, style, label in (("loss", "-", "training"), ("eval_loss", "o-", "evaluation")):
        points = [
            (line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))
        ]
        if points:
            losses.plot(*zip(*points, strict=True), style, label=label, markersize=4)
            losses.legend()
    losses.set(
        ylabel="loss (nats per masked token)", title=run_dir.resolve().name.replace("$", r"\$")
    )
    for text, points in watched.items():
        # Not TeX between dollars; and what begins with _ would be left out of the legend.
        label = "\N{ZERO WIDTH SPACE}" + text.replace("$", r"\$")
        panels[1, 0].plot(*zip(*points, strict=True), "o-", label=label, markersize=4)
        panels[1, 0].legend(fontsize="small")
        panels[1, 0].set(ylabel="probability of the answer", ylim=(-0.03, 1.03))
    for panel in panels[:, 0]:
        panel.grid(alpha=0.3)
    panels[-1, 0].set(xlabel="step")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # its font has no Chinese: boxes will do
        figure.savefig(run_dir / PICTURE, dpi=120)
    pyplot.close(figure)

"""What a run writes as it goes: metrics.jsonl, TensorBoard, the progress bar."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mlm_scratch.loader import Step
from mlm_scratch.report.metrics import (
    METRICS,
    as_json,
    drop_later_lines,
    epoch_of,
    evaluations,
    other_texts,
    read_metrics,
)
from mlm_scratch.report.watch import watched_line
from mlm_scratch.speed.flops import Utilization
from mlm_scratch.util.intervals import wilson_interval
from mlm_scratch.util.progress import progress_bar


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
    """Format a speed."""
    mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
    return f"{speed['tokens_per_second']:,.0f} tokens/s{mfu}"


class Report(Protocol):
    """What the loop reports about a run."""

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


class NoReport:
    """The report of every rank but the first: rank 0 writes for all."""

    def close(self) -> None:
        """Do nothing."""

    def advance(self, step: Step) -> None:
        """Do nothing."""

    def log(self, step: int, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Do nothing."""

    def evaluation(self, step: int, values: dict[str, float], fills: list[dict[str, Any]]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def results(self, final_step: int) -> dict[str, Any]:
        """Return nothing."""
        return {}


class FileReport:
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
        drop_later_lines(first_step, evaluated_at, run_dir / METRICS)
        self.metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        self.board = SummaryWriter(run_dir / "logs", purge_step=first_step + 1)
        self.bar = progress_bar(
            total=total_steps, initial=first_step, desc="training", unit=" steps"
        )
        self.lap, self.whole = Pace(), Pace()  # since the last log line, of this process

    def __enter__(self) -> "FileReport":
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
            for text in other_texts(values):
                loss, ppl, accuracy = (
                    values[f"eval_{text}_{name}"] for name in ("loss", "perplexity", "accuracy")
                )
                lines.append(
                    f"    {text}: loss {loss:.4f}, perplexity {ppl:.2f}, accuracy {accuracy:.3f}"
                )
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
        self.metrics.write(as_json(line) + "\n")
        self.metrics.flush()


def answers_line(results: dict[str, Any]) -> str:
    """Format how many answers are right in sentences that the bundled corpus leaves out."""
    answers = results["answers"]
    if not answers or answers["reporting"][1] == 0:
        return ""
    (right, n), (right_chosen, n_chosen) = answers["reporting"], answers["choosing"]
    low, high = wilson_interval(right, n)
    return (
        f"answers in sentences that the text leaves out: {right} of {n} right ({right / n:.3f}, "
        f"95 % interval {low:.3f} to {high:.3f}); and {right_chosen} of the {n_chosen} by which "
        "the recipe was chosen"
    )


def summary(results: dict[str, Any]) -> str:
    """Format time, speed, and the perplexity before and after; `results` are Report.results."""
    duration = tqdm.format_interval(results["seconds"])
    line = f"{results['steps']:,} steps in {duration}, {shown_speed(results)} with evaluations"
    before, after = results["before"], results["after"]
    if "perplexity" in before and "perplexity" in after and before["step"] < after["step"]:
        line += f"; perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f}"
        for text in other_texts(after):
            name = f"eval_{text}_perplexity"
            line += f", {text} {before[name]:.2f} -> {after[name]:.2f}"
    return line

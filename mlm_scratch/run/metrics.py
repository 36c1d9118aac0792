"""What a run tells: progress bar, metrics.jsonl, TensorBoard, the picture of the loss."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mlm_scratch.util.progress import progress_bar

METRICS = "metrics.jsonl"
PICTURE = "loss.png"


class Report:
    """Writes the metrics of a run as it goes. Use as a context manager.

    metrics.jsonl holds no clock times, so equal runs have equal files; tokens per second go to the
    progress bar and to TensorBoard only.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        total_steps: int,
        steps_per_epoch: int,
        evaluated_at: int = 0,
    ):
        """first_step: steps done so far; evaluated_at: steps done at the last evaluation. What an
        interrupted run noted after them is dropped: it will be noted again."""
        self.run_dir, self.steps_per_epoch = run_dir, steps_per_epoch
        _forget_after(first_step, evaluated_at, run_dir / METRICS)
        self.metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        self.board = SummaryWriter(run_dir / "logs", purge_step=first_step + 1)
        self.bar = progress_bar(
            total=total_steps, initial=first_step, desc="training", unit=" steps"
        )
        self.tokens, self.since = 0, time.perf_counter()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Finish the bar and the files; once more does no harm."""
        self.bar.close()
        self.board.close()
        self.metrics.close()

    def advance(self, n_tokens: int) -> None:
        """Count one optimizer step over n_tokens tokens."""
        self.bar.update()
        self.tokens += n_tokens

    def log(self, step: int, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Note the training metrics: mean loss since the last log, the rest of this step."""
        now = time.perf_counter()
        tokens_per_second = self.tokens / (now - self.since)
        self.tokens, self.since = 0, now
        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        self._write({"step": step, "epoch": self._epoch(step), **values})
        for name, value in {**values, "tokens_per_second": tokens_per_second}.items():
            self.board.add_scalar(f"train/{name}", value, step)
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Note the result of an evaluation."""
        self._write({"step": step, "epoch": self._epoch(step), **values})
        for name, value in values.items():
            self.board.add_scalar(f"eval/{name.removeprefix('eval_')}", value, step)
        with tqdm.external_write_mode():
            print(
                f"step {step}: eval loss {values['eval_loss']:.4f}, perplexity "
                f"{values['perplexity']:.2f}, accuracy {values['eval_accuracy']:.3f}",
                flush=True,
            )
        self.since = time.perf_counter()  # an evaluation is not training time
        self.tokens = 0

    def sync(self) -> None:
        """Bring the lines up to now down to the disk: a checkpoint must not outlive them."""
        os.fsync(self.metrics.fileno())

    def _epoch(self, step: int) -> float:
        epoch, step_of_epoch = divmod(step - 1, self.steps_per_epoch)
        return epoch + (step_of_epoch + 1) / self.steps_per_epoch  # as Trainer rounds it

    def _write(self, line: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()


class NoReport:
    """The report of all processes but the first: nothing."""

    def close(self) -> None:
        """Nothing was opened."""

    def advance(self, n_tokens: int) -> None:
        """The first process counts the tokens of all."""

    def log(self, step: int, loss: float, learning_rate: float, grad_norm: float) -> None:
        """The first process notes the same numbers."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The first process notes the same numbers."""

    def sync(self) -> None:
        """Nothing was written."""


def _forget_after(last_step: int, last_evaluation: int, metrics: Path) -> None:
    """Cut the file where the lines of later steps begin, or a line that was not finished."""
    metrics.touch()
    kept = 0
    with metrics.open("rb+") as file:
        for line in file:
            if _is_later(line, last_step, last_evaluation):
                break  # also at a line that is not ours, and so at what follows it
            kept += len(line)
        file.truncate(kept)


def _is_later(line: bytes, last_step: int, last_evaluation: int) -> bool:
    try:
        values = json.loads(line)
        last = last_evaluation if "eval_loss" in values else last_step
        return not line.endswith(b"\n") or values["step"] > last
    except (ValueError, KeyError, TypeError, RecursionError):
        if line.endswith(b"\n"):  # else a kill came while it was written
            print(
                f"warning: {METRICS}: dropped from a line on that cannot be read: {line[:40]!r}",
                file=sys.stderr,
            )
        return True


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    with (run_dir / METRICS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def draw_losses(run_dir: Path) -> None:
    """Draw loss.png, training and evaluation loss over the steps, from metrics.jsonl."""
    import matplotlib  # half a second to import, needed once at the very end

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run_dir)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for points, style, label in ((train, "-", "training"), (held_out, "o-", "evaluation")):
        points = [(step, loss) for step, loss in points if math.isfinite(loss)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
            axes.legend()
    axes.set(xlabel="step", ylabel="loss (nats per masked token)", title=run_dir.name)
    axes.grid(alpha=0.3)
    figure.savefig(run_dir / PICTURE, dpi=120)
    pyplot.close(figure)

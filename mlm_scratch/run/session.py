"""The frame around the loop: from the settings to a finished run directory."""

import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.stream import StreamLoader
from mlm_scratch.explain.__main__ import short_form
from mlm_scratch.loader import Loader
from mlm_scratch.parallel.ranks import Ranks
from mlm_scratch.run.build import Training, prepare
from mlm_scratch.run.checkpoint import newest_valid_checkpoint, save_model
from mlm_scratch.run.directory import (
    LATEST,
    check_output_dir,
    claim,
    make_run_dir,
    point_latest_to,
    resumed_config,
    run_of_launch,
    write_run_json,
)
from mlm_scratch.run.metrics import NoReport, Report, draw_losses
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.util.errors import UserError

MODEL = "model"


@dataclass
class Run:
    """A run while it is open: its directory, and what its steps need."""

    directory: Path
    training: Training
    report: Report | NoReport
    stop: StopRequest

    def conclude(self, stopped: bool) -> None:
        """Leave behind what a finished run leaves, or after a stop signal say how to go on."""
        t = self.training
        self.report.close()
        if t.ranks.is_first:
            draw_losses(self.directory)
        if stopped:
            print(f"stopped; go on with: {_resume_command(self.directory)}", flush=True)
            raise SystemExit(128 + self.stop.agreed)
        if not t.weights_are_finite():
            raise UserError(
                f"the weights are NaN or infinite after step {t.steps_done}: there is no model to "
                "save; begin a new run with a lower --lr or --weight-decay"
            )
        if t.ranks.is_first:
            if lost := t.lost_steps.item():
                print(f"warning: {lost} steps had a NaN or infinite loss", file=sys.stderr)
            save_model(self.directory / MODEL, t.model, t.tokenizer)


@contextmanager
def open_run(config: TrainConfig, resume: bool, ranks: Ranks) -> Iterator[Run]:
    """Prepare all that the loop needs, in a run directory that is this run's alone. What goes wrong
    with the directory is a UserError.

    Only the first process makes, claims and writes it.
    """
    config, resume = ranks.first_decides(lambda: _what_to_run(config, resume, ranks))
    with ExitStack() as held:
        if resume:
            directory = Path(config.output_dir or LATEST)
            ranks.first_decides(lambda: held.enter_context(claim(directory)))
            checkpoint = ranks.first_decides(lambda: _checkpoint_to_resume(directory))
            t = prepare(config, checkpoint, ranks)
        else:
            ranks.first_decides(lambda: check_output_dir(config))
            t = prepare(config, None, ranks)
            # Only now that nothing is wrong with text and model:
            directory = ranks.first_decides(lambda: _new_directory(config, held))
        if isinstance(t.loader, StreamLoader):
            held.callback(t.loader.close)
        with (
            _told_in_one_line(directory),
            StopRequest(ranks) as stop,
            _begin(t, directory) if ranks.is_first else nullcontext(NoReport()) as report,
        ):
            yield Run(directory, t, report, stop)


def _what_to_run(config: TrainConfig, resume: bool, ranks: Ranks) -> tuple[TrainConfig, bool]:
    """What was asked for, or after a restart the same run again from its last checkpoint."""
    if ranks.launch.restarts:
        begun = run_of_launch(config.output_dir, ranks.name)
        if begun is not None:
            return resumed_config(begun, {}), True
    return config, resume


def _new_directory(config: TrainConfig, held: ExitStack) -> Path:
    directory = make_run_dir(config)
    held.enter_context(claim(directory))
    check_output_dir(config)  # another run may have come and gone meanwhile
    return directory


def _checkpoint_to_resume(directory: Path) -> Path | None:
    checkpoint = newest_valid_checkpoint(directory)
    if checkpoint is None and (directory / MODEL).exists():
        raise UserError(
            f"--resume: {directory} has its final model but no valid checkpoint to go on from; "
            "begin a new run"
        )
    if checkpoint is None:
        print(f"{directory} has no checkpoint yet: from the beginning")
    return checkpoint


def _begin(t: Training, directory: Path) -> Report:
    """Put the directory in the state in which the first step of this process finds it."""
    shutil.rmtree(directory / MODEL, ignore_errors=True)  # after a resume it is final no longer
    if t.steps_done:
        t.remove_old_checkpoints(directory)  # where a kill came before it
    write_run_json(t.config, directory, t.ranks.name)
    point_latest_to(directory)
    together = f", {t.ranks.size} processes" if t.ranks.size > 1 else ""
    if not t.steps_done and isinstance(t.loader, Loader):
        print(*short_form(t.loader, t.tokenizer, t.config), sep="\n")
    print(f"run: {directory}, steps {t.steps_done} to {t.total_steps}{together}", flush=True)
    return Report(directory, t.steps_done, t.total_steps, t.loader.steps_per_epoch, t.evaluated_at)


@contextmanager
def _told_in_one_line(directory: Path) -> Iterator[None]:
    """Turn what the system refuses into a UserError."""
    report_of_thread = threading.excepthook

    def report_once(thread: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread: its OSError comes up here at the next line it is to write."""
        if not issubclass(thread.exc_type, OSError):
            report_of_thread(thread)

    threading.excepthook = report_once
    try:
        yield
    except RuntimeError as error:
        # Raised wherever this process is just then.
        if not re.search("DataLoader worker .* (is killed|exited)", str(error)):
            raise
        raise UserError(
            "a process that reads the stream ahead was killed (for its memory?); go on with: "
            f"{_resume_command(directory)}"
        ) from error
    except BrokenPipeError:  # nobody reads what is printed: that is no fault of the directory
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"cannot write to {directory}: {error.strerror or error}{where}; its checkpoints are "
            f"kept: mend that, then go on with: {_resume_command(directory)}"
        ) from error
    finally:
        threading.excepthook = report_of_thread


def _resume_command(directory: Path) -> str:
    return f"python train.py --resume --output-dir {shlex.quote(str(directory))}"

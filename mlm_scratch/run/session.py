"""A run from its settings to a finished run directory: `train`, and the frame around the loop."""

import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from mlm_scratch.config import TrainConfig
from mlm_scratch.parallel.ranks import Ranks, all_ranks
from mlm_scratch.report.first_row import first_row_lines
from mlm_scratch.report.log import FileReport, NoReport, Report
from mlm_scratch.report.picture import draw_losses
from mlm_scratch.run.build import prepare
from mlm_scratch.run.directory import (
    check_output_dir,
    claim,
    make_run_dir,
    point_latest_to,
    resumed_config,
    run_of_launch,
    write_run_json,
)
from mlm_scratch.run.ending import leave_behind
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.run.state import Training
from mlm_scratch.run.steps import run_steps
from mlm_scratch.speed.flops import Utilization
from mlm_scratch.util.errors import UserError, out_of_memory_means
from mlm_scratch.util.runs import LATEST, MODEL, newest_valid_checkpoint, put_back_replaced


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train with these settings, from the start or from the newest valid checkpoint of a run.

    Returns:
        the run directory, with the final model in `model/`.

    Raises:
        UserError: something that the user can fix.
        SystemExit: 128 + signal after a stop signal, once a checkpoint is written.
    """
    with all_ranks() as ranks, open_run(config, resume, ranks) as run:
        t = run.training
        # Before the first step; or, if a signal cut it short before the resume, that of this step.
        ends = t.evaluate_and_save(run.report, run.stop) if t.evaluation_is_due() else False
        if not (ends or t.out_of_patience()):
            with out_of_memory_means(_how_to_go_on(t)):
                run_steps(t, run.report, run.stop)
        run.conclude()
    return t.run_dir


@dataclass
class Run:
    """A run while it is open."""

    training: Training
    report: Report
    stop: StopRequest

    def conclude(self) -> None:
        """Write what a finished run leaves behind, or after a stop signal print how to resume."""
        t = self.training
        t.saver.finish()
        self.report.close()
        if self.stop.agreed:
            if t.ranks.is_first:
                draw_losses(t.run_dir)
            print(f"stopped; go on with: {_resume_command(t.run_dir)}", flush=True)
            raise SystemExit(128 + self.stop.agreed)
        if t.ranks.is_first:
            leave_behind(t, self.report)


@contextmanager
def open_run(config: TrainConfig, resume: bool, ranks: Ranks) -> Iterator[Run]:
    """Prepare all that the loop needs, in a run directory that belongs to this run alone.

    Only rank 0 makes, locks and writes it.

    Raises:
        UserError: also for errors of the directory while the run is open.
    """
    config, resume = ranks.rank0_decides(lambda: _what_to_run(config, resume, ranks))
    with ExitStack() as held:
        if resume:
            directory = Path(config.output.output_dir or LATEST)
            ranks.rank0_decides(lambda: held.enter_context(claim(directory)))
            checkpoint = ranks.rank0_decides(lambda: _checkpoint_to_resume(directory))
            t = prepare(config, checkpoint, ranks)
        else:
            ranks.rank0_decides(lambda: check_output_dir(config.output.output_dir))
            t = prepare(config, None, ranks)
            # Only now that text and model are known to be fine:
            directory = ranks.rank0_decides(lambda: _new_directory(config, held))
        t.run_dir = directory
        held.callback(t.source.close)
        with (
            _directory_errors(directory),
            t.precision.tf32(),
            StopRequest(ranks) as stop,
            t.saver,
            _begin(t) if ranks.is_first else nullcontext(NoReport()) as report,
        ):
            yield Run(t, report, stop)


def _what_to_run(config: TrainConfig, resume: bool, ranks: Ranks) -> tuple[TrainConfig, bool]:
    """Return the settings given, or after a restart by torchrun those of the same run, resumed."""
    if ranks.restarts:
        begun = run_of_launch(config.output.output_dir, ranks.name)
        if begun is not None:
            return resumed_config(begun, {}), True
    return config, resume


def _new_directory(config: TrainConfig, held: ExitStack) -> Path:
    directory = make_run_dir(config)
    held.enter_context(claim(directory))
    check_output_dir(config.output.output_dir)  # another run may have come and gone meanwhile
    return directory


def _checkpoint_to_resume(directory: Path) -> Path | None:
    put_back_replaced(directory)
    checkpoint = newest_valid_checkpoint(directory)
    if checkpoint is None and (directory / MODEL).exists():
        raise UserError(
            f"--resume: {directory} has its final model but no valid checkpoint to go on from; "
            "begin a new run"
        )
    if checkpoint is None:
        print(f"{directory} has no checkpoint yet: starting from the beginning")
    return checkpoint


def _begin(t: Training) -> FileReport:
    """Bring the run directory into the state that the first step of this process expects."""
    shutil.rmtree(t.run_dir / MODEL, ignore_errors=True)  # no longer final after a resume
    if t.steps_done:
        t.remove_old_checkpoints(t.steps_done)  # where a kill came before it
    write_run_json(t.config, t.run_dir, t.ranks.name, t.labels)
    point_latest_to(t.run_dir)
    if not t.steps_done:
        for line in first_row_lines(t.source, t.loader.rows_per_step, t.tokenizer, t.config):
            print(line)
    ranks = f", {t.ranks.size} processes" if t.ranks.size > 1 else ""
    print(f"run: {t.run_dir}, steps {t.steps_done} to {t.total_steps}{ranks}", flush=True)
    return FileReport(
        t.run_dir,
        t.steps_done,
        t.total_steps,
        t.loader.steps_per_epoch,
        max(t.evaluations, default=-1),
        Utilization(t.model, t.precision),
    )


@contextmanager
def _directory_errors(directory: Path) -> Iterator[None]:
    """Turn errors of the operating system during a run into a UserError."""
    excepthook = threading.excepthook

    def ignore_os_errors(thread: threading.ExceptHookArgs) -> None:
        """Ignore TensorBoard's thread: its OSError is raised here, too, with its next line."""
        if not issubclass(thread.exc_type, OSError):
            excepthook(thread)

    threading.excepthook = ignore_os_errors
    try:
        yield
    except RuntimeError as error:
        # DataLoader's signal handler raises it wherever this process happens to be.
        if not re.search("DataLoader worker .* (is killed|exited)", str(error)):
            raise
        raise UserError(
            "a process that reads the stream ahead was killed (out of memory?); go on with: "
            f"{_resume_command(directory)}"
        ) from error
    except BrokenPipeError:  # the reader of our output is gone: not the directory's fault
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"cannot write to {directory}: {error.strerror or error}{where}; its checkpoints are "
            f"kept: fix that, then go on with: {_resume_command(directory)}"
        ) from error
    finally:
        threading.excepthook = excepthook


def smaller_batches(t: Training, command: str = "") -> str:
    """Describe how the same steps fit into less memory: with these flags, after a command."""
    size, ways = t.config.optimization.batch_size, []
    if size > 1:
        smaller = max(part for part in range(1, size) if size % part == 0)
        accumulate = t.config.optimization.accumulate * size // smaller
        ways.append(f"--batch-size {smaller} --accumulate {accumulate}")
    if t.hf_model.supports_gradient_checkpointing and not t.config.machine.gradient_checkpointing:
        ways.append("--gradient-checkpointing")
    if not ways:
        return "begin a new run with a smaller --block-size or model"
    return f"the same steps fit with: {command}{' or '.join(ways)}"


def _how_to_go_on(t: Training) -> str:
    command = _resume_command(t.run_dir)
    if t.ranks.by_torchrun:
        command = command.replace("python", f"torchrun --nproc-per-node {t.ranks.local_size}", 1)
    return smaller_batches(t, f"{command} ")


def _resume_command(directory: Path) -> str:
    return f"python train.py --resume --output-dir {shlex.quote(str(directory))}"

"""Kill training runs at random moments, resume them, and compare with runs left alone.

    python -m tests.tools.faults --kills 200

Every run is killed and resumed until it has finished, and then compared with the same run left
alone: metrics, checkpoints, optimizer, random states and final weights, bit for bit. Half of the
kills are SIGKILL at a random time, a third SIGKILL at a random call that changes the disk, the rest
SIGTERM at a random time. 200 kills take about 6 minutes on 2 cores.
"""

import argparse
import faulthandler
import itertools
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  imported once here instead of in every child
import torch
from tqdm import tqdm

from mlm_scratch.config import TrainConfig, changed
from mlm_scratch.run import build, ending, session, state
from mlm_scratch.run.saver import Saver
from mlm_scratch.util.runs import RUN_JSON
from tests.support.same import assert_same_run
from tests.support.tiny import SENTENCES, save_files, small_config

PHASES = ("before the first step", "in a step", "while evaluating", "while saving")
START, STEP, EVALUATION, SAVE = range(4)
DISK = ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (torch, "save"))

# All with accumulation, dropout, a save and an evaluation in mid-epoch.
SETTINGS = {
    "batch_size": 4,
    "accumulate": 2,
    "eval_fraction": 0.5,
    "save_every": 8,
    "eval_every": 10,
    "max_steps": 60,
    "eval_batch_size": 2,
}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"precision": "fp32"},
    {"precision": "fp16"},  # with the scaler
    {"grouping": "lines", "whole_word": True, "keep": 1, "best": True},
)
IN_BACKGROUND = 1  # the variant whose killed runs, as on a GPU, take steps while they save


def run_in_child(
    config: TrainConfig, phase: mmap.mmap, die_at_call: int, in_background: bool
) -> int:
    """Fork a process that trains, or resumes if `config.output.output_dir` holds a run.

    Args:
        config: the settings of the run.
        phase: a byte shared with the child: an index of PHASES.
        die_at_call: the child kills itself at this call of a function in DISK; 0: never.
        in_background: save while the steps go on.

    Returns:
        its process id.
    """
    if child := os.fork():
        return child
    code: str | int | None = 1
    try:
        torch.set_num_threads(1)
        # All forks share tqdm's own lock, and a killed one would keep it forever.
        tqdm.set_lock(threading.RLock())
        for stream in (1, 2):
            os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        faulthandler.dump_traceback_later(600, exit=True, file=2)  # if it hangs
        follow(phase, die_at_call)
        if in_background:
            build.Saver = lambda in_background: Saver(in_background=True)  # type: ignore
        session.train(config, resume=Path(config.output.output_dir or "", RUN_JSON).exists())
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        os._exit(code if isinstance(code, int) else 1)


def follow(phase: mmap.mmap, die_at_call: int) -> None:
    """Record in `phase` where this process is, and die at the given call."""
    calls, die_before = itertools.count(1), random.random() < 0.5

    def deadly(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            here = next(calls) == die_at_call
            if here and die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def recorded(function: Callable, during: int) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, phase[0] = phase[0], during
            try:
                return function(*args, **kwargs)
            finally:
                phase[0] = before

        return call

    for module, name in DISK:
        setattr(module, name, deadly(getattr(module, name)))
    for owner, name, during in (
        (state, "evaluate", EVALUATION),
        (session, "run_steps", STEP),
        (state, "save_checkpoint", SAVE),
        (ending, "save_model", SAVE),
    ):
        setattr(owner, name, recorded(getattr(owner, name), during))


def kill_until_finished(
    config: TrainConfig,
    seconds: float,
    max_kills: int,
    deaths: Counter,
    in_background: bool = False,
) -> None:
    """Train, with kills until there have been `max_kills`.

    Args:
        config: the settings of the run.
        seconds: how long the run takes if it is left alone.
        max_kills: of all runs together.
        deaths: counts the kills by phase.
        in_background: save while the steps go on.
    """
    phase = mmap.mmap(-1, 1)
    while True:
        phase[0] = START
        kind = random.choice(("time", "time", "time", "call", "call", "term"))
        if deaths.total() >= max_kills:
            kind = "none"
        die_at_call = random.randint(1, 150) if kind == "call" else 0
        child = run_in_child(config, phase, die_at_call, in_background)
        if kind in ("time", "term"):
            time.sleep(random.uniform(0, seconds))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL if kind == "time" else signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        if code == -signal.SIGTERM or code == 128 + signal.SIGTERM:
            deaths["stopped by SIGTERM"] += 1
        elif code == -signal.SIGKILL:
            deaths[PHASES[phase[0]]] += 1
        else:
            raise RuntimeError(f"a run ended with {code}:\n{Path('log.txt').read_text()[-3000:]}")


def main() -> None:
    """Kill, resume and compare."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="kills in all (200)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the random moments (0)"
    )
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        os.environ |= {
            "MLM_SCRATCH_CACHE": f"{directory}/rows",
            "HF_DATASETS_CACHE": f"{directory}/datasets",
        }
        save_files(Path(), [f"{i}: {s}" for i in range(40) for s in SENTENCES])
        deaths: Counter[str] = Counter()
        runs, whole_runs = 0, {}
        while deaths.total() < arguments.kills:
            variant = runs % len(VARIANTS)
            config = small_config(Path(), **SETTINGS, **VARIANTS[variant])
            if variant not in whole_runs:
                whole_dir, begin = Path(f"whole-{variant}"), time.perf_counter()
                kill_until_finished(changed(config, output_dir=str(whole_dir)), 0, 0, Counter())
                whole_runs[variant] = (whole_dir, time.perf_counter() - begin)
            whole_dir, seconds = whole_runs[variant]
            killed_dir = Path(f"killed-{runs}")
            killed = changed(config, output_dir=str(killed_dir))
            kill_until_finished(killed, seconds, arguments.kills, deaths, variant == IN_BACKGROUND)
            assert_same_run(whole_dir, killed_dir)
            shutil.rmtree(killed_dir)
            runs += 1
            print(
                f"{runs} runs finished after {deaths.total()} kills: all as if left alone",
                file=sys.stderr,
            )
        print(f"{runs} runs, {deaths.total()} kills; every run ended like the one left alone")
        for phase, count in sorted(deaths.items()):
            print(f"{count:5} {phase}")


if __name__ == "__main__":
    main()

"""Kill training runs at random moments, resume them, and compare with runs left alone.

    python -m tests.tools.faults --kills 200

Every run is killed and resumed until it is through, and then compared with the same run left
alone: metrics, checkpoints, optimizer, random states, final weights, bit for bit. Half of the kills
come at a random time, a third at a random call among those that change the disk, the rest are
SIGTERM.
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
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  imported once here instead of in every child
import torch
from tqdm import tqdm

from mlm_scratch import loop
from mlm_scratch.config import TrainConfig, resolve
from mlm_scratch.run import build, session
from mlm_scratch.run.directory import RUN_JSON
from tests.support.same import assert_same_run
from tests.support.tiny import SENTENCES, save_roberta

PHASES = ("before the first step", "in a step", "while evaluating", "while saving")
START, STEP, EVALUATION, SAVE = range(4)
DISK = ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (torch, "save"))

# Accumulation, dropout, a save and an evaluation in mid-epoch; each with a twist of its own.
VARIANTS = (
    {"precision": "fp32"},
    {"precision": "fp16"},  # with the scaler
    {"grouping": "lines", "whole_word": True, "keep": 1},
)


def run_in_child(config: TrainConfig, phase: mmap.mmap, die_at_call: int = 0) -> int:
    """Fork a process that trains, or goes on if `config.output_dir` holds a run.

    Args:
        phase: a byte shared with the child: where it is, an index of PHASES.
        die_at_call: the child kills itself at this call of a function in DISK; 0: never.

    Returns: its process id.
    """
    if child := os.fork():
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        # tqdm's own lock is one for all forked processes, and a killed one would keep it for ever.
        tqdm.set_lock(threading.RLock())
        for stream in (1, 2):
            os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)  # should it hang
        follow(phase, die_at_call)
        loop.train(config, resume=(Path(config.output_dir) / RUN_JSON).exists())
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        os._exit(code)


def follow(phase: mmap.mmap, die_at_call: int) -> None:
    """Note in `phase` where this process is, and die where it shall."""
    calls, die_before = itertools.count(1), random.random() < 0.5

    def deadly(function):
        def call(*args, **kwargs):
            here = next(calls) == die_at_call
            if here and die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def noted(function, during: int):
        def call(*args, **kwargs):
            before, phase[0] = phase[0], during
            try:
                return function(*args, **kwargs)
            finally:
                phase[0] = before

        return call

    for module, name in DISK:
        setattr(module, name, deadly(getattr(module, name)))
    loop.evaluate = noted(loop.evaluate, EVALUATION)
    loop.run_steps = noted(loop.run_steps, STEP)
    build.save_checkpoint = noted(build.save_checkpoint, SAVE)
    session.save_model = noted(session.save_model, SAVE)


def kill_until_through(
    config: TrainConfig, seconds: float, kills_left: int, deaths: Counter
) -> None:
    """Train with at most `kills_left` kills; `deaths` counts the phases they came in.

    seconds: what the run takes when it is left alone.
    """
    phase = mmap.mmap(-1, 1)
    while True:
        phase[0] = START
        kind = random.choice(("time", "time", "time", "call", "call", "term"))
        if deaths.total() >= kills_left:
            kind = "none"
        child = run_in_child(config, phase, random.randint(1, 150) if kind == "call" else 0)
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
    """Kill, resume and compare until the kills are used up."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        os.environ |= {
            "MLM_SCRATCH_CACHE": f"{directory}/rows",
            "HF_DATASETS_CACHE": f"{directory}/datasets",
        }
        save_roberta(Path("model"))
        Path("a.txt").write_text("\n".join(f"{i}: {s}" for i in range(40) for s in SENTENCES))
        deaths, runs = Counter(), 0
        whole_runs = {}
        while deaths.total() < arguments.kills:
            variant = runs % len(VARIANTS)
            config = {
                "model": "model",
                "train_file": ("a.txt",),
                "block_size": 16,
                "lr": 1e-3,
                "batch_size": 4,
                "accumulate": 2,
                "eval_fraction": 0.5,
                "log_every": 3,
                "save_every": 8,
                "eval_every": 10,
                "device": "cpu",
                "max_steps": 60,
                "eval_batch_size": 2,
                **VARIANTS[variant],
            }
            if variant not in whole_runs:
                whole = resolve("tutorial", {**config, "output_dir": f"whole-{variant}"})
                begin = time.perf_counter()
                kill_until_through(whole, 0, 0, Counter())
                whole_runs[variant] = (Path(whole.output_dir), time.perf_counter() - begin)
            whole_dir, seconds = whole_runs[variant]
            killed = resolve("tutorial", {**config, "output_dir": f"killed-{runs}"})
            kill_until_through(killed, seconds, arguments.kills, deaths)
            assert_same_run(whole_dir, Path(killed.output_dir))
            shutil.rmtree(killed.output_dir)
            runs += 1
            print(
                f"{runs} runs through after {deaths.total()} kills: all as if left alone",
                file=sys.stderr,
            )
        print(f"{runs} runs, {deaths.total()} kills; every run ended like the one left alone")
        for phase, count in sorted(deaths.items()):
            print(f"{count:5} {phase}")


if __name__ == "__main__":
    main()

"""Checkpoints written in the background: the same files, and the same guarantees."""

import gc
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from mlm_scratch.loop import run_steps
from mlm_scratch.model import MaskedLM
from mlm_scratch.parallel.ranks import all_ranks
from mlm_scratch.run import build, state
from mlm_scratch.run.saver import Saver, copied_to_cpu
from mlm_scratch.run.session import open_run, train
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.runs import checkpoints, find_fault
from tests.support.same import assert_same_run
from tests.support.tiny import small_config

SETTINGS = {"eval_fraction": 0.2, "save_every": 4, "max_steps": 14, "precision": "fp16"}


@pytest.fixture
def in_background(monkeypatch):
    """Save as on a GPU."""
    monkeypatch.setattr(build, "Saver", lambda in_background: Saver(in_background=True))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The run with the same settings whose steps wait for each save."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return train(small_config(files, output_dir=str(directory), **SETTINGS))


@pytest.fixture
def slow_disk(monkeypatch):
    """Let a save begin to write only once three more steps have begun, or the run waits for it."""
    save, forward, steps = state.save_checkpoint, MaskedLM.forward, []
    waits = threading.Event()
    begun_at = []

    def slow(run_dir, step, *args):
        while len(steps) < step + 3 and not waits.is_set():
            time.sleep(0.01)
        begun_at.append((step, len(steps)))
        save(run_dir, step, *args)

    def counted(self, batch):
        if self.training:
            steps.append(batch)
        return forward(self, batch)

    finish = Saver.finish

    def noted(self):
        waits.set()
        finish(self)
        waits.clear()

    monkeypatch.setattr(state, "save_checkpoint", slow)
    monkeypatch.setattr(MaskedLM, "forward", counted)
    monkeypatch.setattr(Saver, "finish", noted)
    return begun_at


def test_steps_go_on_meanwhile_and_are_not_in_the_checkpoint(
    files, whole, in_background, slow_disk
):
    assert_same_run(whole, train(small_config(files, output_dir="run", **SETTINGS)))
    assert [step for step, _ in slow_disk] == [4, 8, 12, 14]
    assert all(steps_begun >= step + 3 for step, steps_begun in slow_disk[:2])


def test_a_save_that_fails_ends_the_run_at_the_next_step(files, in_background, monkeypatch):
    save, steps = state.save_checkpoint, []

    def full(run_dir, step, *args):
        if step == 8:
            raise OSError(28, "No space left on device")
        save(run_dir, step, *args)

    forward = MaskedLM.forward

    def slow_step(self, batch):
        steps.append(batch)
        time.sleep(0.2)  # so that the failure is there before the step ends
        return forward(self, batch)

    monkeypatch.setattr(state, "save_checkpoint", full)
    monkeypatch.setattr(MaskedLM, "forward", slow_step)
    with pytest.raises(UserError, match="cannot write to run: No space left on device"):
        train(small_config(files, output_dir="run", **SETTINGS | {"eval_fraction": 0.0}))
    assert len(steps) == 9
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-4"]


def test_a_stop_signal_waits_for_the_checkpoint(
    files, whole, in_background, slow_disk, monkeypatch
):
    forward, calls = MaskedLM.forward, []

    def signalled(self, batch):
        calls.append(batch)
        if len(calls) == 6:  # while checkpoint-4 waits
            signal.raise_signal(signal.SIGTERM)
        return forward(self, batch)

    monkeypatch.setattr(MaskedLM, "forward", signalled)
    settings = small_config(files, output_dir="run", **SETTINGS)
    with pytest.raises(SystemExit) as stopped:
        train(settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    found = checkpoints(Path("run"))
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-4"]
    assert all(find_fault(path) is None for path in found)
    monkeypatch.setattr(MaskedLM, "forward", forward)
    assert_same_run(whole, train(settings, resume=True))


def test_a_second_copy_is_made_only_once_the_first_is_written(files, in_background, monkeypatch):
    """And the first is gone by then, without the help of the garbage collector."""
    save, readable, copies, alive = state.save_checkpoint, Saver.readable, [], []

    def slow(*args):
        time.sleep(0.2)
        save(*args)

    def noted(self, value):
        alive.append(sum(copy() is not None for copy in copies))
        result = readable(self, value)
        copies.append(weakref.ref(next(iter(result[0].values()))))
        return result

    monkeypatch.setattr(state, "save_checkpoint", slow)
    monkeypatch.setattr(Saver, "readable", noted)
    config = small_config(files, output_dir="run", save_every=2, max_steps=8)
    gc.disable()
    try:
        with all_ranks() as ranks, open_run(config, False, ranks) as run:
            run_steps(run.training, run.report, run.stop)
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


def test_a_write_is_finished_whatever_interrupts_the_run(capsys):
    """Else the run directory would be unlocked while it is written to."""
    ended = []

    def write():
        time.sleep(0.5)
        ended.append(time.monotonic())

    threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,)).start()
    with pytest.raises(KeyError), Saver(in_background=True) as saver:
        saver.write(write)
        raise KeyError
    assert ended and ended[0] <= time.monotonic()
    assert "a checkpoint is being written" in capsys.readouterr().err


def test_a_copy_is_independent_and_keeps_what_is_tied():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    tree = {"a": weight, "b": [weight, (torch.arange(3), "text", None)], "n": 4}
    copy = copied_to_cpu(tree)
    with torch.no_grad():
        weight += 1
    assert copy["a"] is copy["b"][0] and not copy["a"].requires_grad
    assert copy["a"].tolist() == [[1.0] * 3] * 2 and copy["n"] == 4
    assert copy["b"][1][0].tolist() == [0, 1, 2] and copy["b"][1][1:] == ("text", None)

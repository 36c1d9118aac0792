"""Checkpoints written in the background: the same files, and the same guarantees."""

import gc
import signal
import threading
import weakref
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from mlm_scratch.model import MaskedLM
from mlm_scratch.parallel.ranks import all_ranks
from mlm_scratch.run import checkpoint, saver, state
from mlm_scratch.run.saver import Saver, copied_to_cpu
from mlm_scratch.run.session import open_run, train
from mlm_scratch.run.steps import run_steps
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.runs import checkpoints, find_fault
from tests.support.same import assert_same_run
from tests.support.tiny import small_config

SETTINGS = {"eval_fraction": 0.2, "save_every": 4, "max_steps": 14, "precision": "fp16"}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The run with the same settings whose steps wait for each save."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return train(small_config(files, output_dir=str(directory), **SETTINGS))


def test_steps_go_on_meanwhile_and_are_not_in_the_checkpoint(
    files, whole, late_writer, monkeypatch
):
    forward, save_model, steps, at_writing = MaskedLM.forward, checkpoint.save_model, [], []

    def counted(self, batch):
        if self.training:
            steps.append(batch)
        return forward(self, batch)

    def noted(directory, *args):
        at_writing.append((directory.name, len(steps)))
        save_model(directory, *args)

    monkeypatch.setattr(MaskedLM, "forward", counted)
    monkeypatch.setattr(checkpoint, "save_model", noted)
    assert_same_run(whole, train(small_config(files, output_dir="run", **SETTINGS)))
    assert at_writing == [
        ("checkpoint-4", 8),
        ("checkpoint-8", 12),
        ("checkpoint-12", 14),
        ("checkpoint-14", 14),
    ]


def test_a_save_that_fails_ends_the_run_at_the_next_step(files, in_background, monkeypatch):
    save, forward, steps = state.save_checkpoint, MaskedLM.forward, []

    def full(run_dir, step, *args):
        if step == 8:
            raise OSError(28, "No space left on device")
        save(run_dir, step, *args)

    def ends_after_the_failure(self, batch):
        steps.append(batch)
        if len(steps) == 9:
            wait([in_background[0]._writing])
        return forward(self, batch)

    monkeypatch.setattr(state, "save_checkpoint", full)
    monkeypatch.setattr(MaskedLM, "forward", ends_after_the_failure)
    with pytest.raises(UserError, match="cannot write to run: No space left on device"):
        train(small_config(files, output_dir="run", **SETTINGS | {"eval_fraction": 0.0}))
    assert len(steps) == 9
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-4"]


def test_a_stop_signal_waits_for_the_checkpoint(files, whole, late_writer, monkeypatch):
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


def test_a_second_copy_is_made_only_once_the_first_is_written(files, late_writer, monkeypatch):
    """And the first is gone by then, without the help of the garbage collector."""
    readable, copies, alive = Saver.readable, [], []

    def noted(self, value):
        alive.append(sum(copy() is not None for copy in copies))
        result = readable(self, value)
        copies.append(weakref.ref(next(iter(result[0].values()))))
        return result

    monkeypatch.setattr(Saver, "readable", noted)
    config = small_config(files, output_dir="run", save_every=2, max_steps=8)
    gc.disable()
    try:
        with all_ranks() as ranks, open_run(config, False, ranks) as run:
            run_steps(run.training, run.report, run.stop)
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


def test_a_write_is_finished_whatever_interrupts_the_run(monkeypatch, capsys):
    """Else the run directory would be unlocked while it is written to."""
    interrupted, ended = threading.Event(), []

    def write():
        interrupted.wait()
        ended.append(True)

    def interrupted_wait(writes):
        monkeypatch.setattr(saver, "wait", wait)
        interrupted.set()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(saver, "wait", interrupted_wait)
    with pytest.raises(KeyError), Saver(in_background=True) as background:
        background.write(write)
        raise KeyError
    assert ended
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

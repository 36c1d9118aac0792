"""Signals and kills: a run that was stopped ends like one that never was."""

import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlm_scratch.config import changed
from mlm_scratch.data import rows
from mlm_scratch.model import MaskedLM
from mlm_scratch.parallel.ranks import ALONE
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import state
from mlm_scratch.run.session import train
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.util.runs import checkpoints, find_fault, step_of
from tests.support.processes import ROOT, Fork, wait_until
from tests.support.same import assert_same_run
from tests.support.tiny import small_config, small_flags

BOTH_SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def config(files, **settings):
    """15 steps with an evaluation and a save after every fifth."""
    every_fifth = {"eval_fraction": 0.2, "eval_every": 5, "save_every": 5, "max_steps": 15}
    return small_config(files, **{**every_fifth, **settings})


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The run that is never stopped."""
    return train(config(files, output_dir=str(tmp_path_factory.mktemp("whole"))))


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_like_those_left_alone():
    """12 kills; `python -m tests.tools.faults --kills 200` is the same for longer."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.tools.faults", "--kills", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "12 kills; every run ended like the one left alone" in result.stdout


@pytest.mark.parametrize(
    "module, name",
    [(state, "evaluate"), (state, "save_checkpoint"), (MaskedLM, "forward")],
)
@pytest.mark.parametrize("number, code", BOTH_SIGNALS)
def test_a_signal_loses_nothing_wherever_it_arrives(
    files, whole, monkeypatch, capsys, module, name, number, code
):
    settings = config(files, output_dir="stopped run")
    function = getattr(module, name)

    def signalled(*args, **kwargs):
        monkeypatch.setattr(module, name, function)
        os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, signalled)
    with pytest.raises(SystemExit) as stopped:
        train(settings)
    assert stopped.value.code == code
    out, _ = capsys.readouterr()
    assert "go on with: python train.py --resume --output-dir 'stopped run'" in out
    (newest, *_) = checkpoints(Path("stopped run"))
    assert find_fault(newest) is None and not Path("stopped run/model").exists()
    steps = {"evaluate": 0, "forward": 1, "save_checkpoint": 5}  # before the first step, too
    assert newest.name == f"checkpoint-{steps[name]}"
    assert_same_run(whole, train(settings, resume=True))


def test_an_evaluation_repeated_after_a_resume_is_logged_once(files, monkeypatch):
    """Stopped in the evaluation at step 5, then killed after it was repeated."""
    settings = config(files, output_dir="stopped", save_every=7, no_eval_first=True)
    whole = train(changed(settings, output_dir="whole"))
    evaluate, step = state.evaluate, MaskedLM.forward

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "evaluate", signalled)
    with pytest.raises(SystemExit):
        train(settings)
    monkeypatch.setattr(state, "evaluate", evaluate)
    monkeypatch.setattr(MaskedLM, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings, resume=True)
    monkeypatch.setattr(MaskedLM, "forward", step)
    assert '"eval_loss"' in Path("stopped/metrics.jsonl").read_text()
    assert_same_run(whole, train(settings, resume=True))


def test_a_second_interrupt_stops_immediately_and_harms_nothing(files, whole, monkeypatch):
    settings = config(files, output_dir="stopped")
    rename = os.replace

    def interrupted(*args):
        if "checkpoint-10" in str(args[1]):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return rename(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    monkeypatch.setattr(os, "replace", rename)
    assert [path.name for path in checkpoints(Path("stopped"))] == ["checkpoint-5"]
    assert not list(Path("stopped").glob(".unfinished*"))
    assert_same_run(whole, train(settings, resume=True))


@pytest.mark.parametrize("number, code", BOTH_SIGNALS)
def test_a_signal_ends_the_command_with_a_checkpoint_to_resume_from(files, number, code):
    fork = Fork(*small_flags(files), "--max-steps", 10**9, "--log-every", 1, "--save-every", 0)
    metrics = Path("runs/tutorial/metrics.jsonl")
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, [fork])
    fork.send_signal(number)
    ended, out, err = fork.finish()
    assert ended == code, err
    assert "python train.py --resume --output-dir runs/tutorial" in out
    (saved,) = checkpoints(Path("runs/tutorial"))
    step = step_of(saved)
    assert step >= 5
    ended, out, _ = Fork("--resume", "--max-steps", step + 3).finish()
    assert ended == 0 and f"steps {step} to {step + 3}" in out
    assert f"changed: max_steps is {step + 3} now, not {10**9}" in out
    lines = read_metrics(Path("runs/tutorial"))
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and sum("loss" in line for line in lines) == step + 3


def tokenize_forever():
    """Read the documents of the text again and again."""
    tokenize = rows.tokenize
    rows.tokenize = lambda documents, *others: tokenize(itertools.cycle(documents), *others)


@pytest.mark.parametrize("number, code", BOTH_SIGNALS)
def test_a_signal_while_tokenizing_ends_immediately_and_leaves_nothing(
    files, tmp_path, number, code
):
    fork = Fork(
        *small_flags(files),
        environment={"MLM_SCRATCH_CACHE": str(tmp_path / "cache")},
        before=tokenize_forever,
    )
    # Unbuffered after 1,024 documents: tokenizing goes on.
    wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob("cache/*/tokens.bin")), [fork])
    fork.send_signal(number)
    ended, _, err = fork.finish()
    assert ended == code and "Traceback" not in err
    assert not Path("runs").exists() and not list(tmp_path.glob("cache/*"))


def test_the_line_about_a_lost_rank_is_not_cut_off_by_torchrun():
    """It sends SIGTERM to the others. After other errors, the handlers are as before."""
    before = signal.getsignal(signal.SIGTERM)
    by_torchrun = replace(ALONE, by_torchrun=True)
    try:
        for ranks, error, ignored in (
            (by_torchrun, RuntimeError, True),
            (by_torchrun, ValueError, False),
            (ALONE, RuntimeError, False),
        ):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with pytest.raises(error), StopRequest(ranks):
                raise error
            assert (signal.getsignal(signal.SIGTERM) == signal.SIG_IGN) == ignored
    finally:
        signal.signal(signal.SIGTERM, before)

"""Whoever waits is told for what, and whoever does not wait is told nothing."""

import gc
import io
import subprocess
import sys
import time

import pytest

import infer
from mlm_scratch.util import progress
from tests.support.processes import ROOT


def test_who_sends_nothing_is_told_what_is_waited_for(monkeypatch, capsys):
    class Slow(io.StringIO):
        def __next__(self):
            time.sleep(0.2)
            return super().__next__()

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    monkeypatch.setattr(sys, "stdin", Slow("A <mask>.\n"))
    assert infer.read_texts() == ["A <mask>."]
    assert capsys.readouterr().err.startswith("reading texts from standard input, one per line")
    monkeypatch.setattr(sys, "stdin", io.StringIO("A <mask>.\n"))
    monkeypatch.setattr(progress, "PATIENCE", 30)
    infer.read_texts()
    assert capsys.readouterr().err == ""


def test_a_bar_that_is_soon_done_is_not_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for seconds, shown in ((30, False), (0.01, True)):
        monkeypatch.setattr(progress, "PATIENCE", seconds)
        for _ in progress.late_bar(range(3), desc="reading"):
            time.sleep(0.15)  # longer than tqdm waits between two updates
        assert ("reading" in capsys.readouterr().err) == shown


def test_heavy_imports_are_announced_and_not_collected():
    """In a process of its own: here they are done."""
    code = (
        "import gc, sys\n"
        "sys.stderr.isatty = lambda: True\n"
        "from mlm_scratch.util import progress\n"
        "progress.PATIENCE = 0.01\n"
        "done = []\n"
        "gc.callbacks.append(lambda phase, info: done.append(phase))\n"
        "with progress.heavy_imports():\n"
        "    import torch\n"
        "assert done == ['start', 'stop'] and gc.isenabled()\n"
        "with progress.heavy_imports():\n"
        "    pass\n"
        "assert len(done) == 2\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "importing torch and transformers\n"


def test_old_objects_are_apart_only_for_a_while():
    with pytest.raises(ValueError), progress.old_objects_apart():
        assert gc.get_freeze_count() > 0
        raise ValueError
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen():
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with progress.old_objects_apart():
            pass
        assert gc.get_freeze_count() == before > 0
    finally:
        gc.unfreeze()

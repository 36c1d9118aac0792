"""How a process ends: alone, or as one of several ranks."""

import subprocess
import sys

import pytest

from tests.support.processes import ROOT

CODE = """
import atexit, sys, threading, time
from mlm_scratch.util.launch import exit_process
atexit.register(print, "at exit")
threading.Thread(target=time.sleep, args=[60]).start()  # Python would wait for it
print("not flushed")
exit_process({code})
"""


@pytest.mark.parametrize("code", [0, 2, 143])
def test_a_rank_ends_at_once_and_loses_no_output(monkeypatch, code):
    """Its output is a pipe, in which lines wait to be flushed."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    command = [sys.executable, "-c", CODE.format(code=code)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert (result.returncode, result.stdout) == (code, "not flushed\nat exit\n"), result.stderr

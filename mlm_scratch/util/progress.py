"""What is being done, where it takes a while: bars, and lines that come late or not at all."""

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from mlm_scratch.util.launch import this_launch

PATIENCE = 2.0  # seconds


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """Return a tqdm bar. Only rank 0 shows it; in a log file it prints a line every 15 seconds."""
    interval = 0.1 if sys.stderr.isatty() else 15
    disable = kwargs.pop("disable", False) or not this_launch().is_first
    return tqdm(*args, mininterval=interval, disable=disable, **kwargs)


def late_bar(*args: Any, **kwargs: Any) -> tqdm:
    """Return a bar that is there while something takes longer than PATIENCE, and then goes."""
    return progress_bar(*args, delay=PATIENCE, leave=False, **kwargs)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Print `what` is being done if it takes longer than PATIENCE; on rank 0 alone."""
    timer = threading.Timer(PATIENCE, print, [what], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if this_launch().is_first:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and transformers in three quarters of the time: nothing of them is garbage.

    Python's collector would look through half a million new objects again and again. It is switched
    off meanwhile, and leaves them alone for good.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        with announced("importing torch and transformers"):
            yield
    finally:
        gc.enable()
        gc.freeze()

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
    """Return a bar that appears after PATIENCE seconds, and is removed at the end."""
    return progress_bar(*args, delay=PATIENCE, leave=False, **kwargs)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Tell a terminal `what` takes longer than PATIENCE seconds; from rank 0 alone."""
    timer = threading.Timer(PATIENCE, print, [what], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if this_launch().is_first and sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def old_objects_apart() -> Iterator[None]:
    """Collect garbage among new objects only: those of the imports are many, and never garbage."""
    if gc.get_freeze_count():  # by whoever calls train()
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and transformers a quarter faster, with garbage collection switched off.

    What an import creates is not garbage; the collector would look through half a million new
    objects again and again.
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
        gc.collect()  # once: then it knows how many objects are old, and looks at them seldom

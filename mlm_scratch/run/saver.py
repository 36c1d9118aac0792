"""Writing a checkpoint while a GPU goes on with the next steps.

Weights and optimizer are copied to the CPU first, so that the steps do not change what is being
written. A run on a CPU has no such copy, and no core to spare: it waits until all is written.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

from torch import Tensor


class Saver:
    """Runs one write at a time, in a thread of its own or in the caller's."""

    def __init__(self, in_background: bool):
        self.in_background = in_background
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._writing is not None:  # the run directory is ours until all is written
            try:
                self.finish()
            except KeyboardInterrupt:
                print("a checkpoint is being written: wait for it", file=sys.stderr)

    def readable(self, value: Any) -> Any:
        """Return what a write may read: in the background a copy, since the steps change it."""
        return copied_to_cpu(value) if self.in_background else value

    def write(self, job: Callable[[], None]) -> None:
        """Call `job`, once the one before is done. Raises what that one raised."""
        self.finish()
        if self.in_background:
            self._writing = self._thread.submit(job)
        else:
            job()

    def finish(self) -> None:
        """Wait for the write in the background, and raise what it raised."""
        if self._writing is not None:
            wait([self._writing])  # a signal interrupts this, and the write is still known
            writing, self._writing = self._writing, None
            writing.result()

    def raise_if_failed(self) -> None:
        """Raise what a write has raised meanwhile, without waiting for it."""
        if self._writing is not None and self._writing.done():
            self.finish()


def copied_to_cpu(value: Any) -> Any:
    """Copy all tensors in dicts, lists and tuples to the CPU; one that is there twice, once.

    From a GPU to pinned memory, without waiting: the copies are complete once a number that is
    computed after them has been read.
    """
    return _copied(value, {})


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    # No closure: one that calls itself is a cycle, and its copies wait for the garbage collector.
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", non_blocking=True, copy=True)
        return copies[id(value)]
    if isinstance(value, dict):
        return {name: _copied(entry, copies) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(entry, copies) for entry in value)
    return value

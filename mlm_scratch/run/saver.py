"""Writing a checkpoint while a GPU goes on with the next steps.

Weights and optimizer are copied to the CPU first, so that the steps do not change what is being
written. A run on a CPU has no such copy, and no core to spare: it waits until all is written.
"""

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
        self.finish()

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
    copies: dict[int, Tensor] = {}

    def copied(part: Any) -> Any:
        if isinstance(part, Tensor):
            if id(part) not in copies:
                copies[id(part)] = part.detach().to("cpu", non_blocking=True, copy=True)
            return copies[id(part)]
        if isinstance(part, dict):
            return {name: copied(entry) for name, entry in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(copied(entry) for entry in part)
        return part

    return copied(value)

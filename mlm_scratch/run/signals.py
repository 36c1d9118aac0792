"""SIGINT and SIGTERM ask a run to stop; the loop answers when its step is done."""

import signal
import threading
from types import FrameType, TracebackType

from mlm_scratch.parallel.ranks import ALONE, Ranks


class StopRequest:
    """While entered, remembers the first stop signal instead of dying of it.

    A second SIGINT interrupts at once, as if nobody listened.
    """

    def __init__(self, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.received = 0  # the number of the signal that this process got
        self.agreed = 0  # of the one that all processes know of

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether any process was asked to stop. All of them have to ask this at the same point:
        so they stop after the same step."""
        self.agreed = self.ranks.largest(self.received)
        return self.agreed > 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

"""SIGINT and SIGTERM ask a run to stop; the loop answers when its step is done."""

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """While entered, remembers the first stop signal instead of dying of it.

    A second SIGINT interrupts at once, as if nobody listened.
    """

    received: int | None = None  # the signal's number

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

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

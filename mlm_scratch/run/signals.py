"""SIGINT and SIGTERM ask a run to stop; the loop does so after the current step."""

import signal
import threading
from types import FrameType, TracebackType

from mlm_scratch.parallel.ranks import ALONE, Ranks


class StopRequest:
    """While entered, remembers the first stop signal instead of dying from it.

    A second SIGINT interrupts immediately, as usual, unless a checkpoint is being written in the
    background: that is finished first.
    """

    def __init__(self, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.received = 0  # number of the signal that this process received
        self.agreed = 0  # number of the one that all ranks know of

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
        if isinstance(error, RuntimeError) and self.ranks.by_torchrun and self._previous:
            # Another rank is gone, perhaps. torchrun then stops this one by SIGTERM, which must not
            # come before the line that says so.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def agreed_by_all_ranks(self) -> bool:
        """Whether any rank received a signal. All ranks call this at the same point (all-reduce).

        So they stop after the same step.
        """
        self.agreed = self.ranks.all_reduce_max(self.received)
        return self.agreed > 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

"""Errors that the user can fix are reported in one line; all others keep their traceback."""

import argparse
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).parents[1]
BROKEN_PIPE = 141  # 128 + SIGPIPE, which not every system has


class UserError(Exception):
    """Something the user can fix. The message says what is wrong, where, and what to do."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine ran out of memory (torch has an error type only for CUDA)."""
    no_memory = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in no_memory)


@contextmanager
def out_of_memory_means(advice: str) -> Iterator[None]:
    """Turn "out of memory", on any device, into a UserError with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice}") from error


def is_own_fault(error: BaseException) -> bool:
    """Whether a line of this project raised an error, not a library that it called.

    Only of the kinds that a mistake in the project raises. It keeps its traceback.
    """
    kinds = (AttributeError, IndexError, KeyError, NameError, RuntimeError, TypeError, ValueError)
    if type(error) not in kinds or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def first_line(error: BaseException | str) -> str:
    """Return the first line of a message, all of it if a list follows, or else the error's type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(map(str.strip, lines)) if lines[0].rstrip().endswith(":") else lines[0]


def shortened(text: str) -> str:
    """Quote a text for an error message, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text before an error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print; --help still prints and exits by itself."""
        raise UserError(f"{message} (see python {self.prog} --help)")


def run_command(main: Callable[[], int | None]) -> int:
    """Call `main` and turn what it raises into an exit code.

    Returns:
        what `main` returned (None counts as 0); 2 after a UserError, out of memory, or if the
        output cannot be written; 130 after Ctrl-C; 141 if the reader of the output has gone.
        SIGTERM exits with 143.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  the caller closed it
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "Ġ" or "█" shows "?"
    try:
        code = main() or 0
        print(end="", flush=True)  # a full disk shows up here at the latest
        return code
    except UserError as error:
        message = " ".join(str(error).split())  # one line, even if it quotes several
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (process {rank})"
        print(f"error{where}: {message}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        if error.errno == errno.EPIPE:
            return BROKEN_PIPE
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory: use a smaller model, or another --device "
            f"({shortened(str(error))})",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

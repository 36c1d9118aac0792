"""What torchrun tells this process: the number of ranks, and its own rank.

Does not import torch, so that `--help` and every error before training appear immediately.
"""

import atexit
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from mlm_scratch.util.errors import UserError


@dataclass(frozen=True)
class Launch:
    """The place of this process among the ranks of a run; by default, the only rank.

    Attributes:
        rank: its number, 0 ... size - 1.
        size: the number of ranks.
        local_rank: its number among the local_size ranks on its node.
        local_size: the number of ranks on its node.
        node: the number of its node.
        restarts: how often torchrun has restarted all ranks.
        by_torchrun: whether torchrun supervises the ranks.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    restarts: int = 0
    by_torchrun: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that prints and writes."""
        return self.rank == 0


def this_launch() -> Launch:
    """Read torchrun's environment variables. Raises UserError if one of them is not a number."""

    def number(name: str, default: int) -> int:
        """Return the value of one variable."""
        text = os.environ.get(name, str(default))
        if not text.isdecimal():
            raise UserError(f"the environment variable {name} must be a number, got {text!r}")
        return int(text)

    if "WORLD_SIZE" not in os.environ:
        return Launch()
    launch = Launch(
        rank=number("RANK", 0),
        size=number("WORLD_SIZE", 1),
        local_rank=number("LOCAL_RANK", 0),
        local_size=number("LOCAL_WORLD_SIZE", 1),
        node=number("GROUP_RANK", 0),
        restarts=number("TORCHELASTIC_RESTART_COUNT", 0),
        by_torchrun="TORCHELASTIC_RUN_ID" in os.environ,
    )
    if launch.rank >= launch.size:
        raise UserError(
            f"the environment variable RANK is {launch.rank}, but ranks are numbered from 0, and "
            f"WORLD_SIZE is {launch.size}"
        )
    return launch


def exit_process(code: int | str | None) -> NoReturn:
    """Exit; as one of several ranks without finalizing the interpreter.

    Meanwhile a thread of gloo may ask for the interpreter's lock. Python 3.11 ends such a thread,
    and that aborts the process: "terminate called without an active exception".
    """
    if "WORLD_SIZE" in os.environ and isinstance(code, int):
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # its reader is gone, or it is closed
                stream.flush()
        os._exit(code)
    sys.exit(code)

"""What torchrun told this process: how many there are, and which of them it is."""

import os
from dataclasses import dataclass

from mlm_scratch.util.errors import UserError


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of one run; by default it is alone.

    rank: its number, 0 ... size - 1. local_rank: its number among the local_size on its machine.
    machine: the number of that machine. restarts: how often all processes were started again.
    by_torchrun: whether there is a torchrun that watches over them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machine: int = 0
    restarts: int = 0
    by_torchrun: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0


def this_launch() -> Launch:
    """Read the environment variables that torchrun sets. Raises UserError for nonsense in them."""

    def number(name: str, default: int) -> int:
        """The value of a variable."""
        text = os.environ.get(name, str(default))
        if not text.isdecimal():
            raise UserError(f"the environment variable {name} must be a number, got {text!r}")
        return int(text)

    if "WORLD_SIZE" not in os.environ:
        return Launch()
    launch = Launch(
        number("RANK", 0),
        number("WORLD_SIZE", 1),
        number("LOCAL_RANK", 0),
        number("LOCAL_WORLD_SIZE", 1),
        number("GROUP_RANK", 0),
        number("TORCHELASTIC_RESTART_COUNT", 0),
        "TORCHELASTIC_RUN_ID" in os.environ,
    )
    if launch.rank >= launch.size:
        raise UserError(
            f"the environment variable RANK is {launch.rank}, but ranks are numbered from 0, and "
            f"WORLD_SIZE is {launch.size}"
        )
    return launch

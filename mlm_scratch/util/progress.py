"""Progress bars that are quiet where nobody watches."""

import sys
from typing import Any

from tqdm import tqdm

from mlm_scratch.util.launch import this_launch


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """A tqdm bar; in a log file, where every refresh is a line that stays, one every 15 seconds.
    Of several processes only the first shows its bars."""
    interval = 0.1 if sys.stderr.isatty() else 15
    disable = kwargs.pop("disable", False) or not this_launch().is_first
    return tqdm(*args, mininterval=interval, disable=disable, **kwargs)

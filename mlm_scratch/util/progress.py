"""Progress bars that stay quiet in log files."""

import sys
from typing import Any

from tqdm import tqdm

from mlm_scratch.util.launch import this_launch


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """Return a tqdm bar. Only rank 0 shows it; in a log file it prints a line every 15 seconds."""
    interval = 0.1 if sys.stderr.isatty() else 15
    disable = kwargs.pop("disable", False) or not this_launch().is_first
    return tqdm(*args, mininterval=interval, disable=disable, **kwargs)

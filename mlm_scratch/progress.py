"""Progress bars that are quiet where nobody watches."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """A tqdm bar; in a log file, where every refresh is a line that stays, one every 15 seconds."""
    interval = 0.1 if sys.stderr.isatty() else 15
    return tqdm(*args, mininterval=interval, **kwargs)

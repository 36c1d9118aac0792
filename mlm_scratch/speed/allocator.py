"""What the C library keeps in memory between two steps of a CPU.

Keeping freed blocks saves a quarter of a distilroberta step; without glibc's thread cache, the
memory of a bf16 run stays at 2.8 GB instead of growing to 5.1 GB in 60 steps. To keep the cache,
set GLIBC_TUNABLES=glibc.malloc.tcache_count=7, its default.
"""

import ctypes
import os
import sys
from pathlib import Path

THREAD_CACHE_OFF = "glibc.malloc.tcache_count=0"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers from glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next tensor (Linux with glibc; else nothing).

    By default it returns each block over 32 MB to the kernel immediately. Every step then
    needs new pages for the gradient of the embeddings, 154 MB for distilroberta, and the kernel
    clears them first: a quarter of the time of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own
        mallopt(M_TRIM_THRESHOLD, -1)  # nor is the end of the heap returned


def restart_without_thread_cache() -> None:
    """Start this command line again with a setting that only a new process can make.

    glibc keeps small freed blocks of a thread apart (tcache). Torch's large blocks leave slivers
    of that size between them, which then keep large free blocks from growing together, and with
    `keep_freed_memory` the heap of a CPU run grows by the step. Takes a tenth of a second. Does
    nothing in a notebook, where this process is not the command line's, or beside a GPU.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    is_command = sys.orig_argv[-len(sys.argv) :] == sys.argv
    beside_gpu = Path("/proc/driver/nvidia/version").exists()
    is_set = THREAD_CACHE_OFF.split("=")[0] in given
    if sys.platform == "linux" and is_command and not beside_gpu and not is_set:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, THREAD_CACHE_OFF)))
        os.execv(sys.executable, sys.orig_argv)

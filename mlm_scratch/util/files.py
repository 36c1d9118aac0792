"""Writing files that survive a power cut, and checksums that detect damage."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush what was written to a file or directory to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Return the cache of this project: $MLM_SCRATCH_CACHE or ~/.cache/mlm_scratch.

    Safe to delete.
    """
    return Path(os.environ.get("MLM_SCRATCH_CACHE") or Path.home() / ".cache" / "mlm_scratch")

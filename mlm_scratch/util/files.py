"""Writing files that survive a power cut, and checksums that detect damage."""

import hashlib
import os
import shutil
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
    publish(unfinished, path)


def publish(unfinished: Path, path: Path, aside: Path | None = None) -> None:
    """Give a finished file or directory its name, once all of it is on the disk.

    Contents first, names after: the rename must not survive a power cut alone. A directory that has
    the name already is moved to `aside` first, if that is given, and removed at the end.
    """
    inside = unfinished.rglob("*") if unfinished.is_dir() else ()
    for each in (*inside, unfinished):
        sync(each)
    if aside is not None and path.exists():
        os.replace(path, aside)
    os.replace(unfinished, path)
    sync(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Return the cache of this project: $MLM_SCRATCH_CACHE or ~/.cache/mlm_scratch.

    Safe to delete.
    """
    return Path(os.environ.get("MLM_SCRATCH_CACHE") or Path.home() / ".cache" / "mlm_scratch")

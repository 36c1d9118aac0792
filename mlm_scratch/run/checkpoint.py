"""Checkpoints that are whole or absent: written aside, synced, then made visible by one rename.

A checkpoint is a directory that `from_pretrained` loads as it is (weights, configuration,
tokenizer), with the state that the next step depends on and a manifest of sizes and checksums.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.util.errors import UserError

STATE = "training_state.pt"
MANIFEST = "manifest.json"
REPLACED = ".replaced-"  # before the name of a directory that a new one takes the place of


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
) -> Path:
    """Write checkpoint-<step> into `run_dir` and read it back.

    state: whatever `torch.load(weights_only=True)` can read back: tensors, numbers, containers.

    Raises OSError where it cannot be written; all older ones are still there then.
    """
    directory = run_dir / f"checkpoint-{step}"
    save_model(directory, model, tokenizer, state)
    if fault := find_fault(directory):
        raise OSError(f"{directory.name} is not as it was written: {fault}")
    return directory


def save_model(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any] | None = None,
) -> None:
    """Write the model, and the state of its run if there is one, so that `directory` appears whole
    or not at all. Raises OSError."""
    weights = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    needed = weights if state is None else 3 * weights  # AdamW has two moments per weight
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise OSError(f"{directory.name} needs {needed:,} bytes, and only {free:,} are free")
    unfinished = directory.with_name(f".unfinished-{directory.name}")
    replaced = directory.with_name(f"{REPLACED}{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if state is not None:
            torch.save(state, unfinished / STATE)
        _seal(unfinished)
        if directory.exists():  # the same step again: kept until the new one is there
            os.rename(directory, replaced)
        os.rename(unfinished, directory)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk gets its room back
        # The Rust and C++ parts of the libraries do not raise OSError for what the system refuses.
        if re.search("os error|inline_container", str(error)):
            raise OSError(
                f"{directory.name} cannot be written whole (is the disk full?): {error}"
            ) from error
        raise
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _seal(directory: Path) -> None:
    """Note what the files are in a manifest, and bring all of it down to the disk."""
    manifest = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
    # A rename survives a power cut only after what it makes visible: contents first, names after.
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def remove_old(run_dir: Path, step: int, keep: int, scheduled: Callable[[int], bool]) -> None:
    """Remove all but the newest `keep` checkpoints up to that of `step`, which has to be valid.

    scheduled: whether a checkpoint belongs to a step. One of another step, written when a signal
    came, is removed first: a run that was stopped ends with the checkpoints of one that was not.
    """
    # Later ones are left from before a resume, damaged perhaps: this run will write them again.
    kept = [path for path in checkpoints(run_dir) if step_of(path) <= step]
    for old in kept[1:]:
        if not scheduled(step_of(old)):
            kept.remove(old)
            shutil.rmtree(old)
    for old in kept[keep:]:
        shutil.rmtree(old)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [
        path
        for path in run_dir.glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]+", path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The number of steps done when checkpoint-<step> was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_valid_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was written; damaged ones are named."""
    for replaced in run_dir.glob(f"{REPLACED}*"):  # a kill came while a new one took its place
        directory = run_dir / replaced.name.removeprefix(REPLACED)
        if directory.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, directory)
    for directory in checkpoints(run_dir):
        if (fault := find_fault(directory)) is None:
            return directory
        print(f"warning: {directory} is damaged ({fault}) and left aside", file=sys.stderr)
    return None


def load_state(directory: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given. Tensors come back on the CPU.

    Raises UserError for what is no such state. Nothing is unpickled that could run code.
    """
    try:
        return torch.load(directory / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory / STATE} cannot be read: {reason}") from error


def find_fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint: a file missing, shorter or changed; None if it is whole."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        for name, expected in manifest.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if checksum(path) != expected["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None if STATE in manifest else f"{STATE} is missing"


def sync(path: Path) -> None:
    """Bring what was written to a file or directory down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

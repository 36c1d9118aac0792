"""Checkpoints that are complete or absent: written aside, synced, made visible by one rename.

A checkpoint is a directory that `from_pretrained` loads as it is (weights, configuration,
tokenizer), plus the state that the next step depends on and a manifest of sizes and checksums.
util/runs.py finds and verifies them.
"""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.util.errors import UserError, first_line
from mlm_scratch.util.files import checksum, publish
from mlm_scratch.util.runs import MANIFEST, REPLACED, STATE, checkpoints, find_fault, step_of


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
) -> None:
    """Write checkpoint-<step> into `run_dir` and verify it.

    Args:
        run_dir: the run directory.
        step: steps done so far.
        model: its configuration is saved.
        weights: its state, perhaps of an earlier step: the model may change meanwhile.
        tokenizer: saved beside it.
        state: anything that `torch.load(weights_only=True)` reads back: tensors, numbers,
            containers.

    Raises:
        OSError: it cannot be written; all older ones are still there.
    """
    directory = run_dir / f"checkpoint-{step}"
    save_model(directory, model, weights, tokenizer, state)
    if fault := find_fault(directory):
        raise OSError(f"{directory.name} is not as it was written: {fault}")


def save_model(
    directory: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a model, and the state of its run if given; `directory` appears complete or not at all.

    Raises:
        OSError: it cannot be written.
    """
    needed = size_of(model, with_state=state is not None)
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise OSError(f"{directory.name} needs {needed:,} bytes, and only {free:,} are free")
    unfinished = directory.with_name(f".unfinished-{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        if state is not None:
            torch.save(state, unfinished / STATE)
        _note_checksums(unfinished)
        # The same step again: the old one is kept until the new one is there.
        publish(unfinished, directory, directory.with_name(f"{REPLACED}{directory.name}"))
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk gets its space back
        # The libraries' Rust and C++ parts do not raise OSError when a system call fails.
        if re.search("os error|inline_container", str(error)):
            raise OSError(
                f"{directory.name} cannot be written completely (is the disk full?): {error}"
            ) from error
        raise


def size_of(model: PreTrainedModel, *, with_state: bool) -> int:
    """Return the bytes that a model takes on the disk, or a checkpoint, with the run's state."""
    size = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    return 3 * size if with_state else size  # AdamW keeps two moments per weight


def _note_checksums(directory: Path) -> None:
    """Write the manifest of all files."""
    manifest = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


def remove_old(
    run_dir: Path,
    step: int,
    keep: int,
    scheduled: Callable[[int], bool],
    best: Callable[[int], int | None],
) -> None:
    """Remove all but the newest `keep` checkpoints up to that of `step`, which has to be valid.

    Args:
        run_dir: the run directory.
        step: steps done so far.
        keep: how many to keep.
        scheduled: whether a checkpoint belongs to a step. Those of other steps, written on a
            signal, are removed first: so a run that was stopped ends with the same checkpoints.
        best: the step whose checkpoint was the best at a step, and is kept besides.
    """
    # Later ones, damaged perhaps, are from before a resume: this run will write them again.
    present = [path for path in checkpoints(run_dir) if step_of(path) <= step]
    kept = present[:1] + [path for path in present[1:] if scheduled(step_of(path))]
    kept_steps = {step_of(path) for path in kept[:keep]}
    kept_steps |= {best_step for at in kept_steps if (best_step := best(at)) is not None}
    for old in present:
        if step_of(old) not in kept_steps:
            shutil.rmtree(old)


def load_state(directory: Path) -> dict[str, Any]:
    """Load the state that `save_checkpoint` was given, tensors on the CPU.

    Nothing that could run code is unpickled.

    Raises:
        UserError: the file cannot be read as such a state.
    """
    try:
        return torch.load(directory / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{directory / STATE} cannot be read: {first_line(error)}") from error

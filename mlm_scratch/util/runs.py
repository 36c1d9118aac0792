"""The contents of a run directory, and which of its checkpoints are intact.

Does not import torch, so that `infer.py` finds a model, or reports that there is none, immediately.
run/checkpoint.py writes the files that are looked up here.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

from mlm_scratch.util.files import checksum

RUNS = Path("runs")
LATEST = RUNS / "latest"

RUN_JSON = "run.json"
MODEL = "model"
STATE = "training_state.pt"
MANIFEST = "manifest.json"
REPLACED = ".replaced-"  # prefix of a checkpoint while a new one takes its place


def newest_run() -> Path:
    """Return runs/latest or, where a system does not allow links, the run that began last."""
    begun = sorted(RUNS.glob(f"*/{RUN_JSON}"), key=lambda path: path.stat().st_mtime)
    return LATEST if LATEST.exists() or not begun else begun[-1].parent


def checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    found = [
        path
        for path in run_dir.glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]+", path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps done when checkpoint-<step> was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def put_back_replaced(run_dir: Path) -> None:
    """Give a checkpoint its name back that was being replaced when its run was killed.

    For the run itself, which has locked the directory: another may be replacing it just now.
    """
    for replaced in run_dir.glob(f"{REPLACED}*"):
        directory = run_dir / replaced.name.removeprefix(REPLACED)
        if directory.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, directory)


def newest_valid_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint whose files are all intact; warn about damaged ones.

    Changes nothing: a run may be writing to the directory. One that is being replaced comes last.
    """
    for directory in (*checkpoints(run_dir), *run_dir.glob(f"{REPLACED}*")):
        if (fault := find_fault(directory)) is None:
            return directory
        print(f"warning: {directory} is damaged ({fault}) and skipped", file=sys.stderr)
    return None


def find_fault(directory: Path) -> str | None:
    """Describe the damage of a checkpoint: a missing, cut or changed file. None if it is intact."""
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

"""The run directory: names that never collide, run.json, runs/latest, and what a resume may change.

Does not import torch, so that `train.py --resume` reports wrong settings immediately.
"""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlm_scratch.config import BUNDLED, RECIPES, SECTIONS, TUTORIAL, TrainConfig, changed
from mlm_scratch.hf.hub import go_offline_without_hub, model_commit, model_digest
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.files import checksum, write_text
from mlm_scratch.util.launch import this_launch
from mlm_scratch.util.runs import LATEST, MODEL, RUN_JSON, RUNS, checkpoints, newest_run

LOCK = ".lock"

# Settings that a resume may change; any other change would make it another run.
MAY_CHANGE_ON_RESUME = {
    "epochs",
    "max_steps",
    "log_every",
    "save_every",
    "keep",
    "eval_every",
    "eval_batch_size",
    "no_eval_first",
    "watch",
    "best",
    "patience",
    "device",
    "precision",
    "compile",
    "no_graph",
    "gradient_checkpointing",
    "no_packing",
    "output_dir",
    # Where things lie. What they hold is compared instead: CONTENTS.
    "model",
    "add_tokens",
    "dataset",
    "dataset_commit",
    "train_file",
    "eval_file",
}
CONTENTS = {
    "model_commit": "the model",
    "model_digest": "the model",
    "words_digest": "the file of --add-tokens",
    "text_digest": "the training text",
    "eval_digest": "the evaluation text",
}
# What depends on the number of ranks, so that the rows per step stay the same.
PER_RANK = {"batch_size", "accumulate"}


def check_output_dir(output_dir: str | None) -> None:
    """Raise UserError if --output-dir holds a run already or cannot be a directory."""
    if output_dir is None:
        return
    run_dir = Path(output_dir)
    try:
        run_dir.exists()
    except OSError as error:  # a name that is too long
        raise UserError(f"--output-dir cannot be used: {error.strerror}") from error
    if (run_dir / RUN_JSON).exists():
        raise UserError(
            f"{run_dir} already holds a run: add --resume to go on with it, or name another "
            "--output-dir"
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--output-dir {run_dir} is not a directory")
    if (run_dir / MODEL).exists() or any(run_dir.glob("checkpoint-*")):
        raise UserError(
            f"{run_dir} holds models that are not from a run of train.py: name another --output-dir"
        )


def make_run_dir(config: TrainConfig) -> Path:
    """Make the directory of a new run: --output-dir, or the first free runs/<recipe>-N.

    Raises:
        UserError: it cannot be made, or another run has taken it meanwhile.
    """
    try:
        if (named := config.output.output_dir) is not None:
            Path(named).mkdir(parents=True, exist_ok=True)
            check_output_dir(named)
            return Path(named)
        RUNS.mkdir(exist_ok=True)
        number = 1
        while True:
            run_dir = RUNS / (config.recipe if number == 1 else f"{config.recipe}-{number}")
            try:
                run_dir.mkdir()  # if two runs start at once, only one gets this name
                return run_dir
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(f"cannot make the run directory: {error}") from error


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run directory.

    The system releases the lock when this process ends, however it ends.

    Raises:
        UserError: another process has it, or nothing can be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(run_dir / LOCK, timeout=0))
        except Timeout as error:
            raise UserError(
                f"{run_dir} is in use by another process: wait for it, stop it, or begin a run "
                "with another --output-dir"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to {run_dir}: {error.strerror}") from error
        yield


def resumed_config(output_dir: str | Path | None, changes: dict[str, Any]) -> TrainConfig:
    """Return the settings of the run in `output_dir` (None: the newest run), with `changes`.

    Another number of ranks shares the same rows per step.

    Raises:
        UserError: there is no run, or a change would make it another run.
    """
    run_dir = newest_run().resolve() if output_dir is None else Path(output_dir)
    try:
        noted = json.loads((run_dir / RUN_JSON).read_text(encoding="utf-8"))
        saved = _settings_of(noted["config"], run_dir)
        if not (isinstance(noted["processes"], int) and noted["processes"] > 0):
            raise ValueError(f"{noted['processes']!r} processes")
        # The same command line again is no change, however the rows are shared now.
        is_new = {name for name, value in changes.items() if value != saved.get(name)}
        is_new |= PER_RANK if is_new & PER_RANK else set()
        changes = {name: value for name, value in changes.items() if name in is_new}
        saved |= _per_rank(saved["batch_size"], saved["accumulate"], noted["processes"])
    except FileNotFoundError as error:
        raise UserError(
            f"--resume: there is no run in {run_dir} (to begin one there, say what to train)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume: {run_dir / RUN_JSON} cannot be read: {error}") from error
    changes |= _contents_of(changes, saved)
    check_same_run({name: saved.get(name) for name in changes if name not in PER_RANK}, changes)
    _check_same_rows(saved, {**saved, **changes})
    for name, value in changes.items():
        if name != "output_dir" and saved.get(name) != value:
            print(f"changed: {name} is {value} now, not {saved.get(name)}")
    config = changed(TUTORIAL, **{**saved, **changes, "output_dir": str(run_dir)})
    _check_present(config, {*changes}, has_checkpoint=bool(checkpoints(run_dir)))
    return config


def _contents_of(changes: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return what else changes if something lies elsewhere now: its digest, to be compared."""
    also: dict[str, Any] = {}
    if "model" in changes:
        go_offline_without_hub(changes["model"])  # else its clients retry for a minute and a half
        also["model_commit"] = model_commit(changes["model"], saved["revision"])
        also["model_digest"] = model_digest(changes["model"])
        if also["model_commit"] is also["model_digest"] is None and changes["model"] != BUNDLED:
            raise UserError(f"--model: there is no directory {changes['model']}, or no model in it")
    if "add_tokens" in changes:
        try:
            also["words_digest"] = checksum(Path(changes["add_tokens"]))
        except OSError as error:
            raise UserError(f"--add-tokens: {changes['add_tokens']}: {error.strerror}") from error
    if "dataset" in changes:
        also |= {"dataset_commit": None, "train_file": ()}
    return also


def _check_present(config: TrainConfig, given: set[str], has_checkpoint: bool) -> None:
    """Raise UserError for a file or directory of the run that is not where it was."""
    model, text = config.model, config.text
    files = config.evaluation.files_by_name
    needed = {"--train-file": text.train_file, "--eval-file": sum(files.values(), ())}
    if not text.train_file:
        needed["--dataset"] = (text.dataset or "",)
    if not has_checkpoint:  # it brings the model
        needed |= {"--model": (model.name,), "--add-tokens": (model.add_tokens or "",)}
    for flag, paths in needed.items():
        for path in paths if flag[2:].replace("-", "_") not in given else ():
            if os.path.isabs(path) and not os.path.exists(path):
                raise UserError(f"--resume: {path} is gone: say where it is now with {flag}")


def _settings_of(noted: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the settings of run.json by the names of their flags.

    Raises:
        UserError: they are not those that this version has.
    """
    fits = noted.keys() == {"recipe", *SECTIONS} and noted["recipe"] in RECIPES
    for section, kind in SECTIONS.items() if fits else ():
        names = {name for name, _ in kind.options()}
        fits = fits and isinstance(noted[section], dict) and noted[section].keys() == names
    if not fits:
        raise UserError(f"--resume: {run_dir} was begun by another version: begin a new run")
    values = {"recipe": noted["recipe"]}
    for section in SECTIONS:
        values |= noted[section]
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def check_same_run(begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError if a setting that must not change on a resume differs from `begun`."""
    for name, value in begun.items():
        if name in MAY_CHANGE_ON_RESUME or now[name] == value:
            continue
        if name in CONTENTS:
            raise UserError(
                f"--resume: {CONTENTS[name]} has changed since the run was begun, or is another "
                "one; begin a new run"
            )
        raise UserError(
            f"--resume: this run was begun with {name} {value!r}, not {now[name]!r}; begin a "
            "new run for that"
        )


def _check_same_rows(begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError unless batch_size x accumulate is the same."""
    (size, accumulate), (new_size, new_accumulate) = (
        (settings["batch_size"], settings["accumulate"]) for settings in (begun, now)
    )
    if new_size * new_accumulate != size * accumulate:
        raise UserError(
            f"--resume: this run was begun with batch_size {size} x accumulate {accumulate}, not "
            f"{new_size} x {new_accumulate}: keep their product, or begin a new run"
        )


def _per_rank(batch_size: int, accumulate: int, processes: int) -> dict[str, int]:
    """Find the batch_size (not larger) and accumulate that keep a step's rows the same.

    `processes` is the number of ranks that the run was begun with.
    """
    now, rows = this_launch().size, batch_size * accumulate * processes
    if now == processes:
        return {}
    if rows % now > 0:
        raise UserError(
            f"--resume: this run has {rows} rows per step, which {now} processes cannot share: "
            "use a divisor of that number"
        )
    share = rows // now
    size = max(size for size in range(1, batch_size + 1) if share % size == 0)
    print(
        f"changed: begun by {processes} processes, now {now}, each with batch_size {size} and "
        f"accumulate {share // size}"
    )
    return {"batch_size": size, "accumulate": share // size}


def run_of_launch(output_dir: str | None, launch: str) -> Path | None:
    """Find the run that this launch has begun or resumed before it was restarted."""
    for run_dir in [Path(output_dir)] if output_dir else RUNS.glob("*"):
        try:
            noted = json.loads((run_dir / RUN_JSON).read_text(encoding="utf-8"))
            if noted["launch"] == launch:
                return run_dir.resolve()
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def write_run_json(
    config: TrainConfig, run_dir: Path, launch: str, sources: dict[str, str]
) -> None:
    """Note the settings, what is read, the versions of the packages, and the launch.

    On another number of ranks, that number and the settings per rank stay as they were.
    """
    config = changed(config, output_dir=str(run_dir))
    packages = ("torch", "transformers", "datasets", "tokenizers", "numpy")
    content: dict[str, Any] = {
        "config": {"recipe": config.recipe}
        | {section: getattr(config, section).by_flag() for section in SECTIONS},
        "sources": sources,
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
        "processes": this_launch().size,
        "launch": launch,
    }
    if (run_dir / RUN_JSON).exists():
        begun = json.loads((run_dir / RUN_JSON).read_text(encoding="utf-8"))
        if begun["processes"] != content["processes"]:
            content["processes"] = begun["processes"]
            of_begun = begun["config"]["optimization"]
            content["config"]["optimization"] |= {name: of_begun[name] for name in PER_RANK}
    write_text(run_dir / RUN_JSON, json.dumps(content, indent=2))


def point_latest_to(run_dir: Path) -> None:
    """Make runs/latest a link to this run."""
    unfinished = RUNS / f".latest-{os.getpid()}"
    try:
        RUNS.mkdir(exist_ok=True)
        unfinished.symlink_to(os.path.relpath(run_dir.resolve(), RUNS.resolve()))
        os.replace(unfinished, LATEST)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        print(f"warning: {LATEST} cannot be set: {error.strerror}", file=sys.stderr)

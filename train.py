"""Train a masked-language model.

python train.py --epochs 2
python train.py --model distilbert/distilroberta-base --train-file my.txt --lr 5e-5
python train.py --resume
python train.py --dry-run --train-file my.txt
torchrun --nproc-per-node 2 train.py --epochs 2
"""

import argparse
import dataclasses
import os
import shlex
import sys
import typing

from mlm_scratch.config import (
    BUNDLED,
    RECIPES,
    SECTIONS,
    check_effect,
    joined,
    named_path,
    resolve,
)
from mlm_scratch.hf.hub import can_load_tutorial, go_offline_without_hub
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.speed.allocator import restart_without_thread_cache
from mlm_scratch.util.errors import OneLineParser, UserError, run_command
from mlm_scratch.util.launch import exit_process, this_launch
from mlm_scratch.util.progress import heavy_imports
from mlm_scratch.util.runs import MODEL, RUN_JSON


def main() -> None:
    """Parse, choose a recipe, train, print where the result is."""
    if not this_launch().is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  only rank 0 prints
    given = vars(parse_arguments())  # only what the command line names
    # Paths become absolute, since a run may be resumed from another directory.
    if "train_file" in given:
        given["train_file"] = tuple(map(os.path.abspath, given["train_file"]))
    if "eval_file" in given:
        named = map(named_path, given["eval_file"])
        given["eval_file"] = tuple(
            joined(name, os.path.abspath(path) if path else "") for name, path in named
        )
    for name in ("add_tokens", "model", "dataset"):
        if name in given and given[name] != BUNDLED and os.path.exists(given[name]):
            given[name] = os.path.abspath(given[name])
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    recipe, resume = given.pop("recipe", "auto"), given.pop("resume", False)
    dry = given.pop("dry_run", False)
    if dry and resume:
        raise UserError("--dry-run tries the first steps of a new run: leave out --resume")
    says_what = recipe != "auto" or given.keys() & {"model", "dataset", "train_file"}
    if resume and says_what and not has_run(given.get("output_dir")):
        print(f"no run in {given['output_dir']} yet: beginning one", flush=True)
        resume = False
    if resume:
        if recipe != "auto":
            given["recipe"] = recipe
        config = resumed_config(given.pop("output_dir", None), given)
        print(f"resuming {config.output.output_dir}", flush=True)
    else:
        recipe, reason = choose_recipe(recipe, given)
        config = resolve(recipe, given)
        print(f"recipe {recipe}: {reason}", flush=True)

    check_effect(config, given)
    text = config.text
    sources = [config.model.name, "" if text.train_file else text.dataset]
    go_offline_without_hub(*filter(None, sources))
    with heavy_imports():
        from mlm_scratch.run.dry_run import dry_run
        from mlm_scratch.run.session import train

    if dry:
        dry_run(config)
        return
    run_dir = train(config, resume=resume)
    print(f"report: {run_dir / 'report.html'}; its picture: loss.png, its numbers: results.json")
    logs, model = (shlex.quote(str(run_dir / name)) for name in ("logs", MODEL))
    print(f"all curves: tensorboard --logdir {logs}")
    name = shlex.quote(f"YOUR_NAME/{run_dir.resolve().name}")
    print(f"share it, with its model card: hf upload {name} {model}")
    print(f"model: {run_dir / MODEL}; try it with")
    print('    python infer.py "The Milky Way is a <mask> galaxy."')


def parse_arguments() -> argparse.Namespace:
    """Turn every setting into a flag, grouped by section. Flags that are not given are absent."""
    parser = OneLineParser(
        prog="train.py",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="The defaults shown are those of the recipe tutorial; bundled overrides some of "
        "them (mlm_scratch/config.py).",
    )
    parser.add_argument(
        "--recipe",
        choices=("auto", *RECIPES),
        help="settings to start from; auto (default): tutorial where the Hub answers or all is "
        "cached, else bundled, which needs no download",
    )
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(name, section.__doc__)
        kinds = typing.get_type_hints(section)
        for setting, option in section.options():
            if "help" in option.metadata:
                flag = "--" + setting.replace("_", "-")
                group.add_argument(flag, **_argument(option, kinds[option.name]))
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output-dir (default: the newest run) from its last checkpoint; "
        "where that directory holds none yet, begin it, if the command says what to train",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the text, the steps, evaluations and checkpoints to come, time three steps, and "
        "begin no run",
    )
    return parser.parse_args()


def _argument(option: dataclasses.Field, kind: type) -> dict:
    """Return the arguments of argparse's add_argument for a field."""
    text = option.metadata["help"].replace("%", "%%")
    if kind is bool:
        return {"action": "store_true", "help": text}
    if option.default not in (None, ()) and typing.get_origin(kind) is not tuple:
        text += f" (default: {option.default})"
    arguments = {"help": text}
    if "choices" in option.metadata:
        arguments["choices"] = option.metadata["choices"]
    if typing.get_origin(kind) is tuple:
        metavar = option.metadata.get("metavar", "PATH")
        return arguments | {"nargs": "+", "action": "extend", "metavar": metavar}
    if option.metadata.get("steps"):
        return arguments | {"type": steps, "metavar": "N"}
    if kind == float | str:
        return arguments | {"type": share, "metavar": "X"}
    kind = next(part for part in (*typing.get_args(kind), kind) if part is not type(None))
    metavar = option.metadata.get("metavar", {int: "N", float: "X"}.get(kind))
    return arguments | {"type": kind, "metavar": metavar}


def steps(text: str) -> float:
    """Parse a number of steps, or a share of the run."""
    return int(text) if text.isdecimal() else float(text)


def share(text: str) -> float | str:
    """Parse a share, or two that a run goes from and to."""
    return ":".join(str(float(part)) for part in text.split(":")) if ":" in text else float(text)


def has_run(output_dir: str | None) -> bool:
    """Whether a directory holds a run. None stands for the newest run: --resume looks for that."""
    return output_dir is None or os.path.exists(os.path.join(output_dir, RUN_JSON))


def choose_recipe(recipe: str, given: dict) -> tuple[str, str]:
    """Choose the recipe and give the reason: the one named, or for "auto" the one that can run."""
    if recipe != "auto":
        return recipe, "as requested"
    named = [name for name in ("model", "dataset", "train_file") if name in given]
    if named:
        return "tutorial", f"its settings for the {named[0].replace('_', ' ')} named"
    possible, reason = can_load_tutorial()
    return ("tutorial" if possible else "bundled"), reason


if __name__ == "__main__":
    restart_without_thread_cache()
    code: int | str | None
    try:
        code = run_command(main)
    except SystemExit as stopped:  # after a signal, or since rank 0 reports an error
        code = stopped.code
    exit_process(code)

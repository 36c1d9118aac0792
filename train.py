"""Train a masked-language model.

python train.py --epochs 2
python train.py --model distilbert/distilroberta-base --train-file my.txt --lr 5e-5
python train.py --resume
torchrun --nproc-per-node 2 train.py --epochs 2
"""

import argparse
import dataclasses
import os
import sys
import typing
from pathlib import Path

from mlm_scratch.config import BUNDLED, RECIPES, TrainConfig, resolve
from mlm_scratch.hf.hub import can_load_tutorial, go_offline_without_hub
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.util.errors import OneLineParser, run_command
from mlm_scratch.util.launch import this_launch


def main() -> None:
    """Parse, choose a recipe, train, say where the result is."""
    if not this_launch().is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  of several processes one prints
    given = vars(parse_arguments())  # only what was named on the command line
    for name in ("train_file", "eval_file"):
        if name in given:  # absolute, since a run may be resumed from another directory
            given[name] = tuple(map(os.path.abspath, given[name]))
    recipe, resume = given.pop("recipe", "auto"), given.pop("resume", False)
    if resume:
        if recipe != "auto":
            given["recipe"] = recipe
        config = resumed_config(given.pop("output_dir", None), given)
        print(f"resuming {config.output_dir}", flush=True)
    else:
        recipe, reason = choose_recipe(recipe, given)
        config = resolve(recipe, given)
        print(f"recipe {recipe}: {reason}", flush=True)

    sources = [config.model] if config.train_file else [config.model, config.dataset]
    go_offline_without_hub(*sources)
    from mlm_scratch.loop import train  # imports torch and transformers: seconds

    run_dir = train(config, resume=resume)
    print(f"picture of the loss: {run_dir / 'loss.png'}")
    print(f"all curves: tensorboard --logdir {run_dir / 'logs'}")
    print(f"model: {run_dir / 'model'}; try it with")
    print('    python infer.py "The Milky Way is a <mask> galaxy."')
    if config.dataset == BUNDLED and this_launch().is_first:
        show_what_was_learned(run_dir / "model")


def show_what_was_learned(directory: Path) -> None:
    """Fill a gap in three sentences that the bundled corpus does not contain: facts that it tells
    in other words. They are the first, middle and last of those whose answer is one token after a
    space, whatever the model makes of them."""
    from mlm_scratch.data.corpus import unseen_sentences
    from mlm_scratch.fill_mask import fill_mask
    from mlm_scratch.hf.load import load_model, load_tokenizer, longest_input

    tokenizer, model = load_tokenizer(directory), load_model(directory)
    gaps = []
    for sentence, answer in unseen_sentences():
        masked = sentence.replace(f" {answer}", f" {tokenizer.mask_token}")
        ids, masked_ids = tokenizer([sentence, masked], verbose=False)["input_ids"]
        differing = [id for id, seen in zip(ids, masked_ids, strict=False) if id != seen]
        one_token = len(ids) == len(masked_ids) and len(differing) == 1
        one_token = one_token and differing[0] != tokenizer.unk_token_id
        if one_token and len(ids) <= longest_input(tokenizer, model):
            gaps.append((masked, answer, differing[0]))
    if len(gaps) < 3:
        return
    print("three sentences that were not in the text:")
    for masked, answer, id in (gaps[0], gaps[len(gaps) // 2], gaps[-1]):
        best = fill_mask(model, tokenizer, masked, top_k=1)[0]
        verdict = "right" if best["token"] == id else f"wrong, it is {answer}"
        print(f"    {masked}  {best['token_str'].strip()} ({best['score']:.2f}): {verdict}")


def parse_arguments() -> argparse.Namespace:
    """Turn every field of TrainConfig into a flag. Flags that are not given do not appear."""
    parser = OneLineParser(
        prog="train.py",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="The defaults shown are those of the recipe tutorial; bundled has some of its own "
        "(mlm_scratch/config.py).",
    )
    parser.add_argument(
        "--recipe",
        choices=("auto", *RECIPES),
        help="settings to start from; auto (default): tutorial where the Hub answers or all is "
        "cached, else bundled, which needs no download",
    )
    types = typing.get_type_hints(TrainConfig)
    for option in dataclasses.fields(TrainConfig):
        if "help" in option.metadata:
            flag = "--" + option.name.replace("_", "-")
            parser.add_argument(flag, **_argument(option, types[option.name]))
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --output-dir, or else the newest one, from its last checkpoint",
    )
    return parser.parse_args()


def _argument(option: dataclasses.Field, kind: type) -> dict:
    """What argparse has to know of a field."""
    text = option.metadata["help"].replace("%", "%%")
    if kind is bool:
        return {"action": "store_true", "help": text}
    if option.default not in (None, ()):
        text += f" (default: {option.default})"
    arguments = {"help": text}
    if "choices" in option.metadata:
        arguments["choices"] = option.metadata["choices"]
    if typing.get_origin(kind) is tuple:
        return arguments | {"nargs": "+", "metavar": "PATH"}
    kind = next(part for part in (*typing.get_args(kind), kind) if part is not type(None))
    metavar = "ID_OR_DIR" if option.name == "model" else None
    return arguments | {"type": kind, "metavar": metavar or {int: "N", float: "X"}.get(kind)}


def choose_recipe(recipe: str, given: dict) -> tuple[str, str]:
    """The recipe to use and why: the one that was named, or for "auto" the one that can run."""
    if recipe != "auto":
        return recipe, "as named"
    named = [name for name in ("model", "dataset", "train_file") if name in given]
    if named:
        return "tutorial", f"its settings for the {named[0].replace('_', ' ')} named"
    possible, reason = can_load_tutorial()
    return ("tutorial" if possible else "bundled"), reason


if __name__ == "__main__":
    sys.exit(run_command(main))

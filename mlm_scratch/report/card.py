"""The model card: model/README.md, which the Hub shows to whoever finds the model there.

It names no user and no directory: of a local path, only the last part.
"""

import dataclasses
import math
import os
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlm_scratch.config import BUNDLED, RECIPES, TrainConfig, resolve
from mlm_scratch.report.picture import PICTURE
from mlm_scratch.report.watch import before_and_after

MAX_ROWS = 20  # of the table of evaluations
# Settings that others follow from (config.resolve).
NAMED = ("model", "init", "dataset", "train_file", "streaming", "max_steps", "eval_split")


def model_card(
    config: TrainConfig,
    sources: dict[str, str],
    rows_per_step: int,
    results: dict[str, Any],
    lines: list[dict[str, Any]],
) -> str:
    """Write the card.

    Args:
        config: the settings of the run.
        sources: what was read for training and evaluation.
        rows_per_step: of all ranks and accumulated batches.
        results: what Report.results returned.
        lines: those of metrics.jsonl.
    """
    config, names = without_directories(config)
    for path, last_part in names.items():
        if os.sep in path:  # not a "." that is anywhere
            sources = {purpose: text.replace(path, last_part) for purpose, text in sources.items()}
    name = "a small ModernBERT" if config.model == BUNDLED else config.model
    parts = [
        _front_matter(config),
        f"# {name}, trained{'' if config.init == 'scratch' else ' further'} as a masked-LM",
        _text(config, name, sources),
        _outcome(results),
        f"![Losses over the steps]({PICTURE})",
        _evaluations(lines),
        "## How it was trained",
        f"```bash\n{command_line(config)}\n```",
        _settings(config, rows_per_step, results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(config: TrainConfig) -> str:
    lines = ["library_name: transformers", "pipeline_tag: fill-mask", "tags: [masked-lm]"]
    if config.model_commit:
        lines.append(f"base_model: {config.model}")
    if config.dataset_commit:
        lines.append(f"datasets: [{config.dataset}]")
    return "\n".join(["---", *lines, "---"])


def _text(config: TrainConfig, name: str, sources: dict[str, str]) -> str:
    start = {
        "pretrained": f"It starts from the weights of {name}",
        "new-head": f"It starts from the encoder of {name} and a random head",
        "scratch": f"It has the shape of {name} and starts from random weights",
    }[config.init]
    commit = f" (commit {config.model_commit})" if config.model_commit else ""
    read = "\n".join(f"- {purpose}: {as_markdown(text)}" for purpose, text in sources.items())
    return f"{start}{commit}.\n\n{read}"


def _outcome(results: dict[str, Any]) -> str:
    before, after = results["before"], results["after"]
    lines = []
    if "perplexity" in before and "perplexity" in after:
        lines.append(
            f"Perplexity of masked tokens in the evaluation text: {before['perplexity']:.2f} after "
            f"{before['step']:,} steps, {after['perplexity']:.2f} after {after['step']:,}."
        )
    for text, first, last in before_and_after(results):
        lines.append(f"- {as_markdown(text)} {as_markdown(first)} → {as_markdown(last)}")
    return "\n".join(lines)


def _evaluations(lines: list[dict[str, Any]]) -> str:
    evaluated = [line for line in lines if "eval_loss" in line]
    if not evaluated:
        return ""
    shown = evaluated[:: math.ceil(len(evaluated) / MAX_ROWS)]
    shown += evaluated[-1:] if shown[-1] is not evaluated[-1] else []
    rows = [
        f"| {line['step']} | {line['epoch']:.2f} | {line['eval_loss']:.4f} | "
        f"{line['perplexity']:.2f} | {line['eval_accuracy']:.3f} |"
        for line in shown
    ]
    title = "| step | epoch | evaluation loss | perplexity | accuracy |"
    return "\n".join([title, "|---|---|---|---|---|", *rows])


def command_line(config: TrainConfig) -> str:
    """Write the command that begins a run with these settings."""
    recipe = RECIPES[config.recipe]
    named = {name: getattr(config, name) for name in NAMED}
    named = {name: value for name, value in named.items() if value != getattr(recipe, name)}
    if config.train_file:
        named.pop("dataset", None)
    implied = resolve(config.recipe, named)  # what need not be said once those are named
    words = ["python", "train.py", "--recipe", config.recipe]
    for option in dataclasses.fields(TrainConfig):
        name, value = option.name, getattr(config, option.name)
        if "help" not in option.metadata or name == "output_dir":
            continue
        if value is None or value is False or value == ():  # no flag says so
            continue
        if name in named or value != getattr(implied, name):
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else value if isinstance(value, tuple) else [value]
    return shlex.join(map(str, words))


def as_markdown(text: str) -> str:
    """Escape what Markdown or HTML would take for markup, in a line."""
    return re.sub(r"([\\`*_\[\]#|<>~$&])", r"\\\1", " ".join(text.split()))


def settings(config: TrainConfig) -> dict[str, str]:
    """Return all settings of a run, as they are said on a command line."""
    return {
        option.name.replace("_", "-"): str(getattr(config, option.name))
        for option in dataclasses.fields(TrainConfig)
        if "help" in option.metadata and getattr(config, option.name) not in (None, ())
    }


def without_directories(config: TrainConfig) -> tuple[TrainConfig, dict[str, str]]:
    """Return the settings with the last parts of local paths only, and those parts by path."""
    local = [name for name in (config.model, config.dataset) if name and os.path.exists(name)]
    local += [*config.train_file, *config.eval_file]
    local += [config.add_tokens] if config.add_tokens else []
    names = {path: Path(path).resolve().name for path in local}
    # Not taken for the built-in model or corpus.
    names |= {path: f"./{BUNDLED}" for path, name in names.items() if name == BUNDLED}
    changed: dict[str, Any] = {
        "train_file": tuple(names[path] for path in config.train_file),
        "eval_file": tuple(names[path] for path in config.eval_file),
        "model": names.get(config.model, config.model),
        "dataset": names.get(config.dataset or "", config.dataset),
        "add_tokens": names.get(config.add_tokens or "", config.add_tokens),
    }
    return dataclasses.replace(config, **changed), names


def _settings(config: TrainConfig, rows_per_step: int, results: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"{results['step']:,} steps of {rows_per_step} rows of up to {config.block_size} tokens "
        f"({config.grouping}), masks on {config.mlm_probability} of them: of these, "
        f"{config.mask_replace_prob} become the mask token and {config.random_replace_prob} "
        f"another one. AdamW, weight decay {config.weight_decay}, learning rate {config.lr} "
        f"({config.schedule}, warm-up {config.warmup_steps}), gradient norm clipped at "
        f"{config.max_grad_norm}. Precision {config.precision}, seed {config.seed}; {packages}."
    )

"""The model card: model/README.md, which the Hub shows beside the model.

Local paths are shortened to their last part; user names never appear.
"""

import math
import os
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mlm_scratch.config import (
    BUNDLED,
    RECIPES,
    SECTIONS,
    TrainConfig,
    changed,
    flags,
    flat,
    joined,
    named_path,
    resolve,
)
from mlm_scratch.report.log import answers_line
from mlm_scratch.report.metrics import other_texts
from mlm_scratch.report.picture import PICTURE
from mlm_scratch.report.watch import before_and_after

MAX_ROWS = 20  # of the table of evaluations
# Settings that others follow from (config.resolve).
NAMED = ("model", "dataset", "train_file", "streaming", "max_steps", "eval_split")


def model_card(
    config: TrainConfig,
    sources: dict[str, str],
    rows_per_step: int,
    results: dict[str, Any],
    lines: list[dict[str, Any]],
    how_to_load: str = "",
) -> str:
    """Write the card.

    Args:
        config: the settings of the run.
        sources: what was read for training and evaluation.
        rows_per_step: of all ranks and accumulated batches.
        results: what Report.results returned.
        lines: those of metrics.jsonl.
        how_to_load: a sentence on it, without a full stop, if not everything loads the tokenizer.
    """
    config, names = without_directories(config)
    for path, last_part in names.items():
        if os.sep in path:  # not a "." that is anywhere
            sources = {purpose: text.replace(path, last_part) for purpose, text in sources.items()}
    name = "a small ModernBERT" if config.model.name == BUNDLED else config.model.name
    parts = [
        _front_matter(config),
        f"# {name}, trained{'' if config.model.init == 'scratch' else ' further'} as a masked-LM",
        _text(config, name, sources),
        as_markdown(f"{how_to_load[:1].upper()}{how_to_load[1:]}." if how_to_load else ""),
        _outcome(results),
        f"![Losses over the steps]({PICTURE})",
        _evaluations(lines),
        "## How it was trained",
        f"```bash\n{command_line(config)}\n```",
        _settings(config, rows_per_step, results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(config: TrainConfig) -> str:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["masked-lm"],
        base_model=config.model.name if config.model.model_commit else None,
        datasets=[str(config.text.dataset)] if config.text.dataset_commit else None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _text(config: TrainConfig, name: str, sources: dict[str, str]) -> str:
    start = {
        "pretrained": f"It starts from the weights of {name}",
        "new-head": f"It starts from the encoder of {name} and a random head",
        "scratch": f"It has the shape of {name} and starts from random weights",
    }[config.model.init]
    commit = f" (commit {config.model.model_commit})" if config.model.model_commit else ""
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
    for name in other_texts(after):
        lines.append(
            f"In the text {name}: {before[f'eval_{name}_perplexity']:.2f}, then "
            f"{after[f'eval_{name}_perplexity']:.2f}."
        )
    if line := answers_line(results):
        lines.append(f"{line[0].upper()}{line[1:]}.\n")
    for text, first, last in before_and_after(results):
        lines.append(f"- {as_markdown(text)} {as_markdown(first)} → {as_markdown(last)}")
    return "\n".join(lines)


def _evaluations(lines: list[dict[str, Any]]) -> str:
    evaluated = [line for line in lines if "eval_loss" in line]
    if not evaluated:
        return ""
    shown = evaluated[:: math.ceil(len(evaluated) / MAX_ROWS)]
    shown += evaluated[-1:] if shown[-1] is not evaluated[-1] else []
    columns = {"perplexity": "perplexity"}
    columns |= {f"eval_{name}_perplexity": f"that of {name}" for name in other_texts(shown[-1])}
    rows = [
        f"| {line['step']} | {line['epoch']:.2f} | {line['eval_loss']:.4f} | "
        f"{' | '.join(f'{line[column]:.2f}' for column in columns)} | {line['eval_accuracy']:.3f} |"
        for line in shown
    ]
    title = f"| step | epoch | evaluation loss | {' | '.join(columns.values())} | accuracy |"
    return "\n".join([title, "|---" * (4 + len(columns)) + "|", *rows])


def command_line(config: TrainConfig) -> str:
    """Write the command that begins a run with these settings."""
    values, of_recipe = flat(config), flat(RECIPES[config.recipe])
    named = {name: values[name] for name in NAMED if values[name] != of_recipe[name]}
    if config.text.train_file:
        named.pop("dataset", None)
    implied = flat(resolve(config.recipe, named))  # what follows from those
    words = ["python", "train.py", "--recipe", config.recipe]
    for name in flags():
        value = values[name]
        if name == "output_dir" or value is None or value is False or value == ():
            continue
        if name in named or value != implied[name]:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else value if isinstance(value, tuple) else [value]
    return shlex.join(map(str, words))


def as_markdown(text: str) -> str:
    """Escape what Markdown or HTML would take for markup, in a line."""
    return re.sub(r"([\\`*_\[\]#|<>~$&])", r"\\\1", " ".join(text.split()))


def settings(config: TrainConfig) -> dict[str, dict[str, str]]:
    """Return the settings of each section by name, written as on a command line."""
    values = flat(config)
    return {
        section: {
            name.replace("_", "-"): _shown(values[name])
            for name, option in kind.options()
            if "help" in option.metadata and values[name] not in (None, ())
        }
        for section, kind in SECTIONS.items()
    }


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def without_directories(config: TrainConfig) -> tuple[TrainConfig, dict[str, str]]:
    """Return the settings with the last parts of local paths only, and those parts by path."""
    text, evaluation, model = config.text, config.evaluation, config.model
    local = [
        name
        for name in (model.name, text.dataset)
        if name and name != BUNDLED and (os.path.isabs(name) or os.path.exists(name))
    ]
    named = [named_path(file) for file in evaluation.eval_file]
    local += [*text.train_file, *(path for _, path in named), *filter(None, [model.add_tokens])]
    names = {path: Path(path).resolve().name for path in local}
    # Not taken for the built-in model or corpus.
    names |= {path: f"./{BUNDLED}" for path, name in names.items() if name == BUNDLED}
    shortened = changed(
        config,
        train_file=tuple(names[path] for path in text.train_file),
        eval_file=tuple(joined(name, names[path]) for name, path in named),
        model=names.get(model.name, model.name),
        dataset=names.get(text.dataset or "", text.dataset),
        add_tokens=names.get(model.add_tokens or "", model.add_tokens),
    )
    return shortened, names


def _settings(config: TrainConfig, rows_per_step: int, results: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [f"{results['step']:,} steps of {rows_per_step} rows, by AdamW; {packages}.", ""]
    for section, values in settings(changed(config, output_dir=None)).items():
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        lines.append(f"- {section}: {as_markdown(listed)}")
    return "\n".join(lines)

"""What the parts of the masking are for: the bundled recipe with one of them changed at a time.

    python -m tests.tools.ablate

trains it with each change and 3 seeds, about a minute each (15 minutes in all), and prints a table
of medians. `--steps 300` is a quick look. A line per run goes to standard error.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.config import BUNDLED_RECIPE, TrainConfig, changed
from mlm_scratch.data.documents import load_documents
from mlm_scratch.data.rows import prepare_rows
from mlm_scratch.fill_mask import fill_mask
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.loader import Batch, Collator, TokenRows, batch_of
from mlm_scratch.run import build
from mlm_scratch.run.ending import RESULTS
from mlm_scratch.run.session import train
from tests.support.fact_prompts import EMITTED

BASE = changed(
    BUNDLED_RECIPE, eval_every=0, no_eval_first=True, watch=(), save_every=0, precision="fp32"
)
CHANGES: dict[str, dict[str, Any]] = {
    "the recipe: 25 %, 80/10/10, drawn anew": {},
    "100/0/0": {"mask_replace_prob": 1.0, "random_replace_prob": 0.0},
    "15 %": {"mlm_probability": 0.15},
    "30 %": {"mlm_probability": 0.3},
    "masks drawn once": {},
}
ONCE = "masks drawn once"
SHARE_REPLACED = 0.1  # of the tokens, to see whether the model notices


class MaskedOnce(Collator):
    """Masks every row of the training text once, before the first step."""

    masked: Batch | None = None  # of all rows, in their order

    def __call__(self, rows: TokenRows, indices: np.ndarray, done: float = 0.0) -> Batch:
        """Pick rows of the batch of all rows, and cut it to the longest of them."""
        if self.masked is None:
            self.masked = super().__call__(rows, np.arange(len(rows)))
        width = int((rows.starts[indices + 1] - rows.starts[indices]).max())
        ids, mask, labels = (part[indices, :width] for part in self.masked[:3])  # type: ignore
        return batch_of(ids, None if mask.all() else mask, labels)


def run(name: str, config: TrainConfig) -> dict[str, float]:
    """Train with one change, and measure what was learned."""
    collator: Callable = build.Collator
    build.Collator = MaskedOnce if name == ONCE else Collator  # type: ignore
    try:
        run_dir = train(config)
    finally:
        build.Collator = collator  # type: ignore
    tokenizer = load_tokenizer(run_dir / "model")
    model = load_model(run_dir / "model").eval()
    results = json.loads((run_dir / RESULTS).read_text())
    (reporting, _), (choosing, _) = (results["answers"][name] for name in ("reporting", "choosing"))
    return {
        "perplexity": results["after"]["perplexity"],
        "accuracy": results["after"]["eval_accuracy"],
        "answers that choose": choosing,
        "answers that report": reporting,
        "in the corpus": right_of(model, tokenizer, EMITTED),
        **at_visible_tokens(model, tokenizer, config),
    }


def right_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: tuple) -> int:
    """Count the prompts whose best fill is the answer."""
    return sum(
        fill_mask(model, tokenizer, prompt, top_k=1)[0]["token_str"].strip() == answer
        for prompt, answer in prompts
    )


@torch.no_grad()
def at_visible_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> dict[str, float]:
    """Say how often the model repeats a token that it sees, and puts a wrong one right.

    For 500 held-out rows without a mask: as they are, and with a tenth of the tokens replaced by
    random ones.
    """
    _, documents = load_documents(config)
    assert documents is not None
    rows = prepare_rows(documents, tokenizer, config)
    generator = torch.Generator().manual_seed(0)
    kept, repaired = [], []
    for number in range(500):
        start, end = rows.starts[number : number + 2]
        ids = torch.from_numpy(rows.tokens[start:end].astype(np.int64))  # (T,)
        is_word = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))  # (T,)
        kept.append((model(ids[None]).logits[0].argmax(-1) == ids)[is_word])
        wrong = (torch.rand(len(ids), generator=generator) < SHARE_REPLACED) & is_word  # (T,)
        noise = torch.randint(5, len(tokenizer), ids.shape, generator=generator)  # (T,)
        guesses = model(torch.where(wrong, noise, ids)[None]).logits[0].argmax(-1)  # (T,)
        repaired.append((guesses == ids)[wrong])
    return {
        "repeats a visible token": torch.cat(kept).float().mean().item(),
        "rights a wrong one": torch.cat(repaired).float().mean().item(),
    }


def main() -> None:
    """Train all, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="steps of each run; default: the whole recipe")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CHANGES}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(42, 42 + arguments.seeds):
            for number, (name, change) in enumerate(CHANGES.items()):
                output_dir = str(Path(directory) / f"{number}-{seed}")
                settings = {"seed": seed, "output_dir": output_dir, "max_steps": arguments.steps}
                found[name].append(run(name, changed(BASE, **change, **settings)))
                print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr, flush=True)
    columns = list(found[name][0])
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, results in found.items():
        cells = []
        for column in columns:
            values = [result[column] for result in results]
            form = "{:.0f}" if isinstance(values[0], int) else "{:.3f}"
            middle, low, high = map(
                form.format, (statistics.median(values), min(values), max(values))
            )
            cells.append(f"{middle} ({low} to {high})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

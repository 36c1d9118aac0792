"""What a mistake costs: 300 steps of the bundled recipe with the learner's function in the loop.

The function goes in through the seams of the chapters, as in mlm_scratch/README.md, "Change it
yourself". Beside it run the same steps with the chapter's own.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from mlm_scratch import loop
from mlm_scratch.config import as_steps, resolve
from mlm_scratch.evaluate import evaluate
from mlm_scratch.fill_mask import fill_mask
from mlm_scratch.loader import Batch, Collator, TokenRows, batch_of
from mlm_scratch.optim import build_schedule
from mlm_scratch.run.build import prepare
from mlm_scratch.run.state import Training
from mlm_scratch.util.progress import progress_bar
from mlm_scratch.util.tables import aligned

STEPS, ROWS_SHOWN = 300, 10
PROMPTS = (
    "The Milky Way is a <mask> galaxy.",
    "The capital of Italy is <mask>.",
    "A young cat is called a <mask>.",
)


def train_beside_the_chapter(chapter: str, solution: Any, steps: int = STEPS) -> Iterator[str]:
    """Train twice; yield the lines of a table of losses, and the fills at the end."""
    settings = {"precision": "fp32", "device": "cpu", "no_packing": True, "max_steps": steps}
    config = resolve("bundled", settings)
    runs, fills = {}, {}
    for name, own in (("the chapter's", None), ("yours", solution)):
        t = prepare(config)
        arguments = t.step_arguments()
        if own is not None:
            PLUGS[chapter](t, own, arguments)
        losses = run(t, arguments, f"training with {name}")
        scores = evaluate(t.model, t.tokenizer, t.eval_rows[""], config, t.precision)
        assert scores is not None  # nothing stops it
        runs[name] = [*losses, scores["eval_loss"]]
        fill = own.fill_mask if own is not None and chapter == "fill_mask" else fill_mask
        fills[name] = [best(fill, t, prompt) for prompt in PROMPTS]
    shown = max(1, steps // ROWS_SHOWN)
    rows = [("loss up to step", *runs)]
    for step in range(shown, steps + 1, shown):
        means = (sum(losses[step - shown : step]) / shown for losses in runs.values())
        rows.append((str(step), *(f"{mean:.4f}" for mean in means)))
    rows.append(("held-out sentences", *(f"{losses[-1]:.4f}" for losses in runs.values())))
    for number, prompt in enumerate(PROMPTS):
        rows.append((prompt, *(of_run[number] for of_run in fills.values())))
    yield from aligned(rows)


def run(t: Training, arguments: dict[str, Any], title: str) -> list[float]:
    """Run all steps; return their losses."""
    steps = progress_bar(
        t.loader.steps(0, t.total_steps), total=t.total_steps, desc=title, leave=False
    )
    return [done.loss.item() for done in loop.run_steps(steps, **arguments)]


def best(fill: Callable[..., list], t: Training, prompt: str) -> str:
    """Return the best fill of a prompt, with its probability."""
    found = fill(t.hf_model, t.tokenizer, prompt, top_k=1)[0]
    return f"{found['token_str'].strip()} ({found['score']:.2f})"


# ---- The seams -----------------------------------------------------------------------------------


def plug_masking(t: Training, solution: Any, arguments: dict[str, Any]) -> None:
    """Override Collator.mask."""

    class Learners(Collator):
        """Masks with the learner's function."""

        def mask(
            self, input_ids: Tensor, special: Tensor, word_ids: Tensor | None, rate: float
        ) -> tuple[Tensor, Tensor]:
            """Call it."""
            return solution.mask_tokens(  # type: ignore[no-any-return]
                input_ids,
                special,
                mask_token_id=self.mask_token_id,
                vocab_size=self.vocab_size,
                mlm_probability=rate,
                mask_replace_prob=self.mask_replace_prob,
                random_replace_prob=self.random_replace_prob,
                word_ids=word_ids,
                generator=self.generator,
            )

    t.loader.collator = Learners(
        t.tokenizer, **t.config.masking.of_collator(), seed=t.config.optimization.seed
    )


def plug_loader(t: Training, solution: Any, arguments: dict[str, Any]) -> None:
    """Override the order of the rows, and how the Collator pads them."""

    class Learners(Collator):
        """Pads with the learner's function."""

        def __call__(self, rows: TokenRows, indices: np.ndarray, done: float = 0.0) -> Batch:
            """Pad, and mask as ever."""
            ends = [(rows.starts[i], rows.starts[i + 1]) for i in indices]
            ids, mask = solution.pad(
                [rows.tokens[start:end].tolist() for start, end in ends], self.pad_token_id
            )
            special = torch.from_numpy(self.is_special[ids.numpy()]) | (mask == 0)  # (B, T)
            first, last = self.mask_rates
            seen, labels = self.mask(ids, special, None, first + done * (last - first))
            return batch_of(seen, mask, labels)

    def rows_of_steps(first: int, last: int) -> Iterator[tuple[TokenRows, np.ndarray]]:
        """Yield the rows of each step in the learner's order."""
        loader = t.loader
        for step in range(first, last):
            epoch, number = divmod(step, loader.steps_per_epoch)
            order = solution.epoch_order(len(loader.rows), loader.seed, epoch)
            start = number * loader.rows_per_step
            yield loader.rows, np.asarray(order)[start : start + loader.rows_per_step]

    t.loader.rows_of_steps = rows_of_steps  # type: ignore[method-assign]
    t.loader.collator = Learners(
        t.tokenizer, **t.config.masking.of_collator(), seed=t.config.optimization.seed
    )


def plug_model(t: Training, solution: Any, arguments: dict[str, Any]) -> None:
    """Compute the loss by the learner's two functions, half of it by each."""

    def forward(batch: Batch) -> Tensor:
        """Sum the losses of a batch, ()."""
        model: Any = t.hf_model
        hidden = model.base_model(batch.input_ids, batch.attention_mask)[0]  # (B, T, H)

        def head(states: Tensor) -> Tensor:
            """(..., H) -> (..., V)."""
            logits: Tensor = model.decoder(model.head(states))
            return logits

        sparse = solution.sparse_loss(hidden, head, batch.labels)
        dense = solution.masked_lm_loss(head(hidden), batch.labels)
        return (sparse + dense) / 2 * len(batch.positions)

    model = t.model.__class__(t.hf_model)
    model.forward = forward  # type: ignore[method-assign]
    arguments["model"] = model


def plug_optim(t: Training, solution: Any, arguments: dict[str, Any]) -> None:
    """Build the optimizer and its schedule from the learner's functions."""
    settings, total = t.config.optimization, t.total_steps
    groups = solution.parameter_groups(t.hf_model, settings.weight_decay)
    optimizer = AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    warmup = as_steps(settings.warmup_steps, total)
    arguments["optimizer"] = optimizer
    arguments["scheduler"] = build_schedule(
        optimizer, lambda step: float(solution.linear(step, total, warmup))
    )


def plug_loop(t: Training, solution: Any, arguments: dict[str, Any]) -> None:
    """Hand run_steps another step."""
    arguments["train_step"] = solution.train_step


def plug_nothing(t: Training, solution: Any, arguments: dict[str, Any]) -> None:
    """Change nothing: fills are made after training."""


PLUGS = {
    "masking": plug_masking,
    "loader": plug_loader,
    "model": plug_model,
    "optim": plug_optim,
    "loop": plug_loop,
    "fill_mask": plug_nothing,
}

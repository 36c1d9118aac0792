"""Exercise 5: one optimizer step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mlm_scratch import loop
from mlm_scratch.exercise.judging import Exercise, Wrong, close, equal
from mlm_scratch.loader import Batch, Step, batch_of
from mlm_scratch.optim import build_schedule

START = '''"""Exercise 5: one optimizer step. Judge it with:

python -m mlm_scratch.exercise loop my_loop.py
"""

from contextlib import nullcontext

import torch


def train_step(
    model,
    optimizer,
    scheduler,
    scaler,
    step,
    *,
    autocast=nullcontext,
    max_grad_norm=1.0,
):
    """Compute the gradients of one optimizer step, and update the weights once.

    Args:
        model: called with a batch, it returns the sum of the losses of its masked tokens, ().
        optimizer: updates the weights.
        scheduler: sets its learning rate; scheduler.step() moves on to the next.
        scaler: a torch.amp.GradScaler: scale, unscale_, step, update, get_scale.
        step: step.batches, a list; step.n_masked, the masked tokens of all of them.
        autocast: returns the context of a forward pass.
        max_grad_norm: the gradients are clipped to this norm.

    Returns:
        (loss, grad_norm), () tensors: nats per masked token of the step; the norm before clipping.
    """
    # 1. For each batch: forward within autocast(), its loss divided by the masked tokens of the
    #    whole step, scaled, backward. The gradients add up.
    # 2. Unscale the gradients, then measure and clip their norm (torch.nn.utils.clip_grad_norm_).
    # 3. Step and update the scaler, and clear the gradients.
    # 4. The scaler skips a step whose gradients are inf or NaN, and halves its scale: such a step
    #    does not count for the schedule.
    # 5. A step without masked tokens changes no weight.
    raise NotImplementedError
'''

V, H, T = 11, 6, 5


class Model(nn.Module):
    """Embeddings and a head: the sum of the losses of a batch, ()."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.factor = factor  # makes gradients overflow

    def forward(self, batch: Batch) -> Tensor:
        """Sum the losses at masked positions."""
        logits = self.head(self.embeddings(batch.input_ids)).flatten(0, 1)  # (B * T, V)
        return self.factor * cross_entropy(
            logits.float(), batch.labels.flatten(), ignore_index=-100, reduction="sum"
        )


def steps(n: int = 3, batches: tuple[int, ...] = (2, 3)) -> list[Step]:
    """Return n steps of batches with these numbers of rows; each batch has other masked tokens."""
    generator, result = torch.Generator().manual_seed(3), []
    for _ in range(n):
        parts = []
        for number, n_rows in enumerate(batches):
            ids = torch.randint(V, (n_rows, T), generator=generator)  # (B, T)
            labels = ids.clone()
            labels[:, number + 1 :] = -100  # 1 masked token a row in the first, 2 in the second
            parts.append(batch_of(ids, None, labels))
        n_masked = sum(len(part.positions) for part in parts)
        result.append(Step(parts, n_masked, sum(part.labels.numel() for part in parts)))
    return result


class Parts:
    """All that a step needs, made anew."""

    def __init__(
        self, scale: float = 0.0, lr: float = 0.1, factor: float = 1.0, adam: bool = False
    ):
        self.model = Model(factor).train()
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        self.optimizer = kind(self.model.parameters(), lr=lr)
        self.scheduler = build_schedule(self.optimizer, lambda step: 1 / (1 + step))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale > 0)

    def run(self, solution: Any, of: list[Step], **options: Any) -> list[tuple[float, float]]:
        """Run steps; return loss and norm of each."""
        results = []
        for step in of:
            result = solution.train_step(
                self.model, self.optimizer, self.scheduler, self.scaler, step, **options
            )
            if not isinstance(result, tuple) or len(result) != 2:
                raise Wrong("(loss, grad_norm)", type(result).__name__)
            results.append((float(result[0]), float(result[1])))
        return results

    def weights(self) -> list[Tensor]:
        """Return copies of the weights."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference between weights."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def both(solution: Any, of: list[Step], scale: float = 0.0, **options: Any) -> tuple[Parts, Parts]:
    """Run the solution, and the chapter, on the same steps."""
    own, chapter = Parts(scale), Parts(scale)
    own.run(solution, of, **options)
    chapter.run(loop, of, **options)
    return own, chapter


EXERCISE = Exercise(
    task="train_step: forward, scale, backward, unscale, clip, step, update, zero, schedule",
    lines=20,
    judged="on a model of 143 weights: what each step does to them",
    defines=("train_step",),
    start=START,
    twin=lambda solution: all(
        difference(*(each.weights() for each in both(solution, steps(), scale))) == 0
        for scale in (0.0, 1024.0)
    ),
    timed=lambda solution: Parts().run(solution, steps(10)),
    chapter=loop,
)


@EXERCISE.check("the loss is the mean over the masked tokens of the step", "sum, then divide once")
def loss(solution: Any) -> None:
    """Of one batch, and of two."""
    for batches in ((2,), (2, 3)):
        (step,) = steps(1, batches)
        (came, _) = Parts().run(solution, [step])[0]
        with torch.no_grad():
            expected = sum(Model()(batch).item() for batch in step.batches) / step.n_masked
        close(f"loss of a step of {len(batches)} batches", came, expected)
        elsewhere = step._replace(n_masked=3 * step.n_masked)  # the rest on other processes
        (came, _) = Parts().run(solution, [elsewhere])[0]
        close("loss, if this process has a third of the masked tokens", came, expected / 3)


@EXERCISE.check("one batch is one step of plain training", "backward, clip, step")
def one_batch(solution: Any) -> None:
    """Weights as the chapter's, within rounding; gradients are short enough not to be clipped."""
    own, chapter = both(solution, steps(1, (4,)), max_grad_norm=100.0)
    close("largest difference of a weight", difference(own.weights(), chapter.weights()), 0.0)


@EXERCISE.check(
    "batches of a step add up to one large batch",
    "each divided by the masked tokens of the whole step, not by its own, nor by their number",
)
def accumulated(solution: Any) -> None:
    """Two batches with 2 and 6 masked tokens."""
    own, chapter = both(solution, steps(1), max_grad_norm=100.0)
    close("largest difference of a weight", difference(own.weights(), chapter.weights()), 0.0)


@EXERCISE.check("each forward pass is within autocast()", "around the model, not around backward")
def in_autocast(solution: Any) -> None:
    """Entered once per batch, and left before backward."""
    inside, seen, parts = [], [], Parts()

    class Noted:
        """Notes that it is entered; as torch.autocast, it may be used again."""

        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *_: object) -> None:
            inside.pop()

    parts.model.register_forward_hook(lambda *_: seen.append(len(inside)))
    weight = parts.model.head.weight
    weight.register_hook(lambda gradient: seen.append(10 + len(inside)))
    parts.run(solution, steps(1), autocast=Noted)
    equal("contexts around a forward: 1, a backward: 0 + 10", sorted({*seen}), [1, 10])


@EXERCISE.check("the norm is measured before clipping", "what clip_grad_norm_ returns")
def norm(solution: Any) -> None:
    """Whatever it is clipped to."""
    expected = Parts().run(loop, steps(1))[0][1]
    for limit in (100.0, 0.01):
        close(
            f"norm, clipped to {limit}",
            Parts().run(solution, steps(1), max_grad_norm=limit)[0][1],
            expected,
        )


@EXERCISE.check("gradients are clipped to max_grad_norm", "before the optimizer uses them")
def clipped(solution: Any) -> None:
    """With SGD, a step moves the weights by lr x norm."""
    parts = Parts()
    before = parts.weights()
    parts.run(solution, steps(1), max_grad_norm=0.01)
    squares = [((a - b) ** 2).sum() for a, b in zip(before, parts.weights(), strict=True)]
    moved = math.sqrt(sum(squares))
    close("how far the weights move", moved, 0.1 * 0.01, 1e-6)


@EXERCISE.check(
    "gradients are unscaled before their norm is measured and clipped",
    "scaled, they are 65,536 times too long: all would be clipped",
)
def unscaled(solution: Any) -> None:
    """With a scale of 65,536, the same step as with none."""
    plain, scaled = Parts(), Parts(65_536.0)
    (expected,) = plain.run(loop, steps(1), max_grad_norm=0.5)
    (came,) = scaled.run(solution, steps(1), max_grad_norm=0.5)
    close("norm", came[1], expected[1], 1e-4)
    close("loss", came[0], expected[0], 1e-4)
    close("largest difference of a weight", difference(scaled.weights(), plain.weights()), 0.0)


@EXERCISE.check("gradients are cleared between steps", "else the next step adds its own to them")
def cleared(solution: Any) -> None:
    """Or before the next one: three steps are three steps."""
    own, chapter = both(solution, steps(3))
    close("largest difference after 3 steps", difference(own.weights(), chapter.weights()), 0.0)


@EXERCISE.check("the schedule moves on once per step", "after the update, not before it")
def scheduled(solution: Any) -> None:
    """The first step has the first rate."""
    parts = Parts()
    parts.run(solution, steps(3))
    equal("steps of the schedule after 3 steps", parts.scheduler.last_epoch, 3)
    growing = Parts()
    growing.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
    growing.run(solution, steps(3))
    equal("the same, while the scale grows", growing.scheduler.last_epoch, 3)
    own, chapter = both(solution, steps(1), max_grad_norm=0.01)
    close(
        "difference of a weight, at the first rate",
        difference(own.weights(), chapter.weights()),
        0.0,
    )


@EXERCISE.check(
    "a step with infinite gradients changes no weight and halves the scale",
    "the scaler decides: it looks for inf while it unscales",
)
def skipped(solution: Any) -> None:
    """A loss of 1e38 overflows in the backward pass once it is scaled."""
    parts = Parts(65_536.0, factor=1e36)
    before = parts.weights()
    parts.run(solution, steps(1))
    equal("largest change of a weight", difference(parts.weights(), before), 0.0)
    equal("the scale", parts.scaler.get_scale(), 32_768.0)


@EXERCISE.check(
    "a skipped step does not count for the schedule", "a scale that fell tells that it was skipped"
)
def skipped_schedule(solution: Any) -> None:
    """The next step has the same rate."""
    parts = Parts(65_536.0, factor=1e36)
    parts.run(solution, steps(2))
    equal("steps of the schedule after 2 skipped ones", parts.scheduler.last_epoch, 0)


@EXERCISE.check(
    "a step without masked tokens changes no weight",
    "0 / 0 is NaN; and AdamW moves weights by momentum and decay even if the gradient is 0",
)
def nothing_masked(solution: Any) -> None:
    """After two steps that leave momentum."""
    parts = Parts(adam=True)
    parts.run(solution, steps(2))
    before = parts.weights()
    (step,) = steps(1)
    empty = [batch_of(b.input_ids, None, torch.full_like(b.labels, -100)) for b in step.batches]
    (came,) = parts.run(solution, [Step(empty, 0, step.n_tokens)])
    equal("loss", came[0], 0.0)
    equal("largest change of a weight", difference(parts.weights(), before), 0.0)

"""Exercise 2: the padded batch of some rows, and the order of an epoch."""

import random
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm_scratch.exercise.judging import Exercise, Wrong, drawn, equal, share_is
from mlm_scratch.loader import epoch_order

START = '''"""Exercise 2: pad rows, and shuffle an epoch. Judge it with:

python -m mlm_scratch.exercise loader my_loader.py
"""

import torch
from torch import Tensor


def pad(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Lay rows of token ids below each other, as wide as the longest.

    Args:
        rows: B lists of ids, of different lengths. Not changed.
        pad_token_id: what to fill the right side of shorter rows with.

    Returns:
        (input_ids, attention_mask), (B, T) int64 each; the mask is 1 at tokens, 0 at padding.
    """
    # A row may have the padding's id in its midst: only its length tells where it ends.
    raise NotImplementedError


def epoch_order(n: int, seed: int, epoch: int):
    """Return the order of n rows in an epoch: the numbers 0 ... n - 1, each once.

    The same for equal arguments, another one in each epoch. An array, a tensor or a list.
    """
    # A generator of its own: torch's is for dropout.
    raise NotImplementedError
'''

ROWS = ([5, 6, 7], [8], [9, 10, 11, 12, 13])
PAD = 3


class _Chapter:
    """The chapter pads inside its Collator."""

    epoch_order = staticmethod(epoch_order)

    @staticmethod
    def pad(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
        """Pad with torch's own helper."""
        tensors = [torch.tensor(row) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(tensors, True, pad_token_id)  # (B, T)
        lengths = torch.tensor([len(row) for row in rows])  # (B,)
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def order(solution: Any, *arguments: int) -> list[int]:
    """Call epoch_order; return a list of numbers."""
    result = solution.epoch_order(*arguments)
    return [int(number) for number in (result.tolist() if hasattr(result, "tolist") else result)]


def padded(solution: Any, rows: Any, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Call pad; check what comes back."""
    result = solution.pad([list(row) for row in rows], pad_token_id)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Wrong("two tensors: (input_ids, attention_mask)", type(result).__name__)
    width = max(map(len, rows))
    for name, tensor in zip(("input_ids", "attention_mask"), result, strict=True):
        if not isinstance(tensor, Tensor):
            raise Wrong(f"{name} is a tensor", type(tensor).__name__)
        equal(f"the shape of {name}", tuple(tensor.shape), (len(rows), width))
        equal(f"the dtype of {name}", tensor.dtype, torch.int64)
    return result


EXERCISE = Exercise(
    task="pad and epoch_order: rows of ids to a batch, and in what order they come",
    lines=8,
    judged="by the rows that come back; the order may be any that is fixed by seed and epoch",
    defines=("pad", "epoch_order"),
    start=START,
    twin=lambda solution: all(
        order(solution, 50, seed, 1) == epoch_order(50, seed, 1).tolist() for seed in (0, 42)
    ),
    timed=lambda solution: (solution.pad([[7] * 128] * 8, PAD), solution.epoch_order(4000, 42, 1)),
    chapter=_Chapter,
)


@EXERCISE.check(
    "a batch is as wide as its longest row", "the longest of these rows, no fixed width"
)
def width(solution: Any) -> None:
    """Of several rows, of one, of equal ones."""
    for rows in (ROWS, [[5]], [[5, 6], [7, 8]]):
        padded(solution, rows, PAD)


@EXERCISE.check("each row stands at the left, padding fills its right", "T - length times the id")
def on_the_right(solution: Any) -> None:
    """With two padding ids."""
    for pad_token_id in (PAD, 0):
        ids, mask = padded(solution, ROWS, pad_token_id)
        for number, row in enumerate(ROWS):
            expected = [*row, *[pad_token_id] * (ids.shape[1] - len(row))]
            drawing = drawn({"input_ids": ids[number].tolist(), "mask": mask[number].tolist()})
            equal(f"row {number}", ids[number].tolist(), expected, drawing)


@EXERCISE.check("attention_mask is 1 at tokens and 0 at padding", "from the lengths of the rows")
def mask(solution: Any) -> None:
    """The sum of each row is its length."""
    _, attention_mask = padded(solution, ROWS, PAD)
    for number, row in enumerate(ROWS):
        expected = [1] * len(row) + [0] * (attention_mask.shape[1] - len(row))
        equal(f"the mask of row {number}", attention_mask[number].tolist(), expected)


@EXERCISE.check(
    "a token that has the padding's id is still a token", "comparing ids with it is not enough"
)
def id_in_the_midst(solution: Any) -> None:
    """In the midst and at the end of a row."""
    rows = [[5, PAD, 6], [7, PAD], [8]]
    ids, attention_mask = padded(solution, rows, PAD)
    for number, row in enumerate(rows):
        drawing = drawn({"id": ids[number].tolist(), "mask": attention_mask[number].tolist()})
        expected = [1] * len(row) + [0] * (3 - len(row))
        equal(f"the mask of {row}", attention_mask[number].tolist(), expected, drawing)


@EXERCISE.check(
    "the caller's rows stay as they are", "append changes the list that it is called on"
)
def rows_stay(solution: Any) -> None:
    """Lists can be changed by mistake."""
    rows = [list(row) for row in ROWS]
    solution.pad(rows, PAD)
    equal("the rows afterwards", rows, [list(row) for row in ROWS])


@EXERCISE.check("each row comes once in an epoch", "a permutation, not n random numbers")
def once(solution: Any) -> None:
    """For several numbers of rows."""
    for n in (1, 2, 7, 100):
        for epoch in range(3):
            came = order(solution, n, 42, epoch)
            equal(f"the sorted order of {n} rows", sorted(came), list(range(n)))


@EXERCISE.check("equal seed and epoch give the same order", "both decide, and nothing else does")
def repeatable(solution: Any) -> None:
    """Whatever other generators do, and without moving them: dropout draws from them."""
    torch.manual_seed(0)
    before = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
    one = order(solution, 100, 42, 3)
    after = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
    for name, state, later in zip(("torch", "numpy", "random"), before, after, strict=True):
        if state != later:
            raise Wrong("a generator of its own", f"the global one of {name} was moved")
    torch.manual_seed(1)
    equal("the order of a second call", order(solution, 100, 42, 3), one)


@EXERCISE.check(
    "another epoch, or seed, has another order", "both decide: else all epochs are alike"
)
def different(solution: Any) -> None:
    """Of 100 rows: by chance never."""
    orders = [order(solution, 100, 42, epoch) for epoch in range(5)]
    equal("different orders in 5 epochs", len({*map(tuple, orders)}), 5)
    seeds = [order(solution, 100, seed, 0) for seed in (1, 5, 9, 1000)]
    equal("different orders of 4 seeds", len({*map(tuple, seeds)}), 4)
    equal("epoch 0 is in the order of the file", orders[0] == list(range(100)), False)


@EXERCISE.check("all orders are equally likely", "not a rotation, nor a few swaps")
def uniform(solution: Any) -> None:
    """The 24 orders of 4 rows, in 10,000 seeds far apart, and in 10,000 epochs of one seed."""
    n = 10_000
    for arguments in ([(10_000 * i, 0) for i in range(n)], [(42, i) for i in range(n)]):
        counts = Counter(tuple(order(solution, 4, *each)) for each in arguments)
        for each in sorted(counts):
            share_is(f"share of the order {each}", counts[each], n, 1 / 24)
        equal("different orders of 4 rows", len(counts), 24)

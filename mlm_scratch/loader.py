"""From rows of token ids to the masked batches of each optimizer step.

Rows lie end to end in one flat array; row i is tokens[starts[i] : starts[i + 1]]:

    tokens  5 6 7 | 8 9 | 10 11 12 13        starts  0 3 5 9

    rows [1, 2] as a batch, (B, T)    8   9   0   0     padded to the longest
                                     10  11  12  13

The unit is the optimizer step. Its rows are padded and masked in one pass and only then split into
batches. So one batch of 32 and four of 8 see the same masks, and the masked tokens of the whole
step are counted before its first backward.

Three things can be replaced from outside: the masking (override `Collator.mask`), the order of the
rows (override `Loader.rows_of_steps`), and, by the arguments `share` and `arrange`, which rows this
process computes and in what layout. As it stands, it computes all of them, padded.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .masking import IGNORE, mask_tokens


@dataclass
class TokenRows:
    """Rows of token ids: row i is tokens[starts[i] : starts[i + 1]]."""

    tokens: np.ndarray  # (total,) ids
    starts: np.ndarray  # (rows + 1,) int64
    # (total,) bool, true where the text has a gap before the token; only for whole words
    gap_before: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Return the lengths of some rows, (B,) -> (B,)."""
        return self.starts[indices + 1] - self.starts[indices]


class Batch(NamedTuple):
    """What one forward pass needs."""

    input_ids: Tensor  # (B, T) int64, as the model sees them
    attention_mask: Tensor | None  # (B, T) int64, 0 at padding, else 1; None without padding
    labels: Tensor  # (B, T) int64, the id to predict, -100 where there is none
    # (N,) int64, flat indices of the masked tokens. Found on the CPU: N is the shape of the logits,
    # and the CPU would have to wait for a GPU to count it.
    positions: Tensor

    def rows(self, part: slice) -> "Batch":
        """Make a batch of some of the rows."""
        mask = None if self.attention_mask is None else self.attention_mask[part]
        return batch_of(self.input_ids[part], mask, self.labels[part])

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`; to a CUDA GPU from pinned memory: the CPU need not wait for that."""
        pinned = device.type == "cuda"
        return Batch._make(
            x if x is None else (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)
            for x in self
        )


def batch_of(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Batch:
    """Make a batch of (B, T) tensors: find the positions of the masked tokens."""
    positions = (labels.flatten() != IGNORE).nonzero().squeeze(1)  # (N,)
    return Batch(input_ids, attention_mask, labels, positions)


class Step(NamedTuple):
    """The data of one optimizer step."""

    batches: list[Batch]  # on the device
    n_masked: int  # masked tokens
    n_tokens: int  # tokens without padding


def all_rows(step: Batch) -> tuple[Batch, int]:
    """Return the rows of a step that this process computes, all, and the step's masked tokens."""
    return step, len(step.positions)


def unchanged(batch: Batch) -> Batch:
    """Return the layout in which the model gets a batch: as it is, padded."""
    return batch


class Loader:
    """All optimizer steps of a run, in order: step s is number s % steps_per_epoch of its epoch.

    The position of a run is the number of its next step and the state of the mask generator.

    Args:
        rows: the rows to train on.
        collator: pads and masks the rows of a step.
        rows_per_step: rows in an optimizer step; the last step of an epoch may have fewer.
        batch_size: at most this many rows go through the model in one pass.
        seed: fixes the order of the rows.
        device: where the batches go; default: the CPU.
        share: Batch of a step -> (the rows that this process computes, masked tokens of all), where
            several processes share the step.
        arrange: Batch -> Batch with the same loss that is cheaper to compute.
    """

    def __init__(
        self,
        rows: TokenRows,
        collator: "Collator",
        *,
        rows_per_step: int,
        batch_size: int,
        seed: int = 42,
        device: torch.device | None = None,
        share: Callable[[Batch], tuple[Batch, int]] = all_rows,
        arrange: Callable[[Batch], Batch] = unchanged,
    ):
        if len(rows) == 0:
            raise ValueError("there are no rows to train on")
        self.rows, self.collator = rows, collator
        self.rows_per_step, self.batch_size, self.seed = rows_per_step, batch_size, seed
        self.device = device or torch.device("cpu")
        self.share, self.arrange = share, arrange
        self.steps_per_epoch = math.ceil(len(rows) / rows_per_step)

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield the steps first ... last - 1 of a run that has `last` steps."""
        for step, (rows, indices) in enumerate(self.rows_of_steps(first, last), first):
            done = step / max(1, last - 1)  # 0 at the first step of the run, 1 at its last
            own, n_masked = self.share(self.collator(rows, indices, done))  # (B, T), masked
            batches = []
            for start in range(0, len(own.labels), self.batch_size):
                batch = own.rows(slice(start, start + self.batch_size))  # as wide as the step
                batches.append(self.arrange(batch).to(self.device))
            yield Step(batches, n_masked, int(rows.lengths(indices).sum()))

    def rows_of_steps(self, first: int, last: int) -> Iterator[tuple[TokenRows, np.ndarray]]:
        """Yield for each step the TokenRows to read, and the indices of its rows in them, (B,)."""
        order = None
        for step in range(first, last):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if step_of_epoch == 0:
                # torch's DataLoader draws a number per epoch from the CPU's global generator. So do
                # we, or dropout on a CPU would differ from Trainer's.
                torch.empty((), dtype=torch.int64).random_()
            if step_of_epoch == 0 or order is None:
                order = epoch_order(len(self.rows), self.seed, epoch)  # (rows,)
            start = step_of_epoch * self.rows_per_step
            yield self.rows, order[start : start + self.rows_per_step]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, without the number of the next step."""
        return {"mask_generator": self.collator.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned."""
        self.collator.generator.set_state(state["mask_generator"])


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of n rows in an epoch, (n,): a permutation fixed by seed and epoch.

    Source: accelerate's SeedableRandomSampler, which Trainer uses.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(n, generator=generator).numpy()


class Collator:
    """Pads and masks rows of token ids, on the CPU, with its own random generator.

    Args:
        tokenizer: names the mask token, and the special tokens, which are never masked.
        mask_rates: share of the tokens to mask at the first and at the last step of a run.
        mask_replace_prob: as in `mask_tokens`, like random_replace_prob.
        random_replace_prob: see there.
        seed: fixes the masks.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask_rates: tuple[float, float] = (0.15, 0.15),
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        seed: int = 42,
    ):
        self.mask_token_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.pad_token_id = tokenizer.pad_token_id or 0  # any id works: attention_mask hides it
        # is_special[ids] does for a whole batch what get_special_tokens_mask does row by row.
        self.is_special = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)  # (V,)
        self.is_special[tokenizer.all_special_ids] = True
        self.mask_rates = mask_rates
        self.mask_replace_prob, self.random_replace_prob = mask_replace_prob, random_replace_prob
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: TokenRows, indices: np.ndarray, done: float = 0.0) -> Batch:
        """Pad rows `indices`, (B,), to the longest, T; mask them at the rate `done` into a run."""
        lengths = rows.lengths(indices)  # (B,)
        columns = np.arange(lengths.max())  # (T,)
        is_token = columns < lengths[:, None]  # (B, T)
        source = np.where(is_token, rows.starts[indices, None] + columns, 0)  # (B, T) of tokens
        ids = np.where(is_token, rows.tokens[source], self.pad_token_id)  # (B, T)

        special = torch.from_numpy(self.is_special[ids] | ~is_token)  # (B, T)
        attention_mask = None if is_token.all() else torch.from_numpy(is_token.astype(np.int64))
        word_ids = None
        if rows.gap_before is not None:  # whole words end at gaps and at special tokens
            gaps = torch.from_numpy(rows.gap_before[source])  # (B, T)
            word_ids = gaps.cumsum(dim=1).masked_fill(special, -1)  # (B, T), equal within a word
        first, last = self.mask_rates
        input_ids, labels = self.mask(  # (B, T), (B, T)
            torch.from_numpy(ids.astype(np.int64)), special, word_ids, first + done * (last - first)
        )
        return batch_of(input_ids, attention_mask, labels)

    def mask(
        self, input_ids: Tensor, special: Tensor, word_ids: Tensor | None, rate: float
    ) -> tuple[Tensor, Tensor]:
        """Mask (B, T) ids: return what the model sees, and labels. Override for another masking.

        Whole words: `word_ids` are equal for neighbouring tokens of a word, -1 at special tokens.
        """
        return mask_tokens(
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

"""From rows of token ids to the masked batches of each optimizer step.

Rows lie end to end in one flat array; row i is tokens[starts[i] : starts[i + 1]]:

    tokens  5 6 7 | 8 9 | 10 11 12 13        starts  0 3 5 9

    rows [1, 2] as a batch, (B, T)    8   9   0   0     padded to the longest
                                     10  11  12  13

The unit is the optimizer step. Its rows (batch_size x accumulate x ranks; a rank is one of the
run's processes, usually the only one) are padded and masked in one pass and only then split, among
the ranks and into batches. So 32 x 1, 8 x 4 and two ranks of 16 see the same masks, and the masked
tokens of the whole step are counted before its first backward.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.packing import PADDED, Layout
from mlm_scratch.data.rows import TokenRows
from mlm_scratch.masking import IGNORE, mask_tokens, word_ids_from_gaps
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.parallel.shares import rows_per_step, share_of_step
from mlm_scratch.util.like_trainer import draw_like_dataloader
from mlm_scratch.util.probabilities import mask_rates
from mlm_scratch.util.shapes import pad_positions


class Batch(NamedTuple):
    """What one forward pass needs."""

    input_ids: Tensor  # (B, T) int64, as the model sees them
    # (B, T) int64, 0 at padding, else the number of the text in its row; None without padding.
    attention_mask: Tensor | None
    labels: Tensor  # (B, T) int64, the id to predict, -100 where there is none
    # (N,) int64, flat indices of the masked tokens. Found on the CPU: N is the shape of the logits,
    # and the CPU would have to wait for a GPU to count it.
    positions: Tensor
    position_ids: Tensor | None = None  # (B, T) int64, from 0 in each text of a packed row

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`; to a CUDA GPU from pinned memory: the CPU need not wait for that."""
        pinned = device.type == "cuda"
        return Batch._make(
            x if x is None else (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)
            for x in self
        )


class Step(NamedTuple):
    """The data of one optimizer step."""

    batches: list[Batch]  # of this rank, on the device
    n_masked: int  # masked tokens, of all ranks
    n_tokens: int  # tokens without padding, of all ranks


class Loader:
    """All optimizer steps of a run, in order: step s is number s % steps_per_epoch of its epoch.

    The position of a run is the number of its next step and the state of the mask generator.
    """

    complete = True  # whether each rank has the rows of all ranks (of a stream only its own)

    def __init__(
        self,
        rows: TokenRows,
        collator: "Collator",
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ):
        self.rows, self.collator, self.config = rows, collator, config
        self.device, self.ranks = device, ranks
        self.rows_per_step = rows_per_step(config, ranks)
        self.steps_per_epoch = math.ceil(len(rows) / self.rows_per_step)

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield the steps first ... last - 1."""
        for step, (rows, indices) in enumerate(self.rows_of_steps(first, last), first):
            done = step / max(1, last - 1)  # 0 at the first step of the run, 1 at its last
            whole_step = self.collator(rows, indices, done)  # (B, T), masked
            share = share_of_step(whole_step.labels, self.ranks, complete=self.complete)
            whole_step = whole_step._replace(labels=share.labels)  # all -100 if it has no rows
            parts = self.collator.split(whole_step, share.rows, self.config.batch_size)
            n_tokens = int((rows.starts[indices + 1] - rows.starts[indices]).sum())
            yield Step([part.to(self.device) for part in parts], share.n_masked, n_tokens)

    def rows_of_steps(self, first: int, last: int) -> Iterator[tuple[TokenRows, np.ndarray]]:
        """Yield for each step the TokenRows to read, and the indices of its rows in them, (B,)."""
        order = None
        for step in range(first, last):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if step_of_epoch == 0:
                draw_like_dataloader()  # one number: torch's generator stays on Trainer's stream
            if step_of_epoch == 0 or order is None:
                order = epoch_order(len(self.rows), self.config.seed, epoch)  # (rows,)
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
    """Pads and masks rows of token ids, on the CPU, with its own random generator."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, layout: Layout = PADDED
    ):
        self.config, self.layout = config, layout
        self.mask_token_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.pad_token_id = tokenizer.pad_token_id or 0  # any id works: attention_mask hides it
        # is_special[ids] does for a whole batch what get_special_tokens_mask does row by row.
        self.is_special = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)  # (V,)
        self.is_special[tokenizer.all_special_ids] = True
        self.generator = torch.Generator().manual_seed(config.seed)
        self.first_rate, self.last_rate = mask_rates(config.mlm_probability)

    def __call__(self, rows: TokenRows, indices: np.ndarray, done: float = 0.0) -> Batch:
        """Pad rows `indices`, (B,), to the longest, T; mask them at the rate `done` into a run."""
        starts = rows.starts[indices]  # (B,)
        lengths = rows.starts[indices + 1] - starts  # (B,)
        columns = np.arange(lengths.max())  # (T,)
        is_token = columns < lengths[:, None]  # (B, T)
        source = np.where(is_token, starts[:, None] + columns, 0)  # (B, T) index into rows.tokens
        ids = np.where(is_token, rows.tokens[source], self.pad_token_id)  # (B, T)

        special = torch.from_numpy(self.is_special[ids] | ~is_token)  # (B, T)
        attention_mask = None if is_token.all() else torch.from_numpy(is_token.astype(np.int64))
        word_ids = None
        if rows.gap_before is not None:  # only with --whole-word
            word_ids = word_ids_from_gaps(torch.from_numpy(rows.gap_before[source]), special)
        input_ids, labels = mask_tokens(  # (B, T), (B, T)
            torch.from_numpy(ids.astype(np.int64)),
            special,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            mlm_probability=self.first_rate + done * (self.last_rate - self.first_rate),
            mask_replace_prob=self.config.mask_replace_prob,
            random_replace_prob=self.config.random_replace_prob,
            word_ids=word_ids,
            generator=self.generator,
        )
        return Batch(input_ids, attention_mask, labels, self.positions_of(labels))

    def split(self, batch: Batch, rows: range, batch_size: int) -> Iterator[Batch]:
        """Yield these rows of a batch, `batch_size` at a time; positions are those in each part."""
        for start in range(rows.start, rows.stop, batch_size):
            yield self.arrange(batch, slice(start, min(start + batch_size, rows.stop)))

    def arrange(self, batch: Batch, part: slice = slice(None)) -> Batch:
        """Make a batch of these rows of another; the layout may pack them (data/packing.py)."""
        ids, mask, labels = batch.input_ids[part], batch.attention_mask, batch.labels[part]
        mask = None if mask is None else mask[part]  # (rows, T) each
        rows = self.layout.arrange(ids, mask, labels, self.config.block_size)
        return Batch(*rows[:3], self.positions_of(rows[2]), rows[3])

    def positions_of(self, labels: Tensor) -> Tensor:
        """(B, T) labels -> (N,) flat indices of the masked tokens."""
        is_masked = labels.flatten() != IGNORE  # (B * T,)
        if self.config.compile:
            return pad_positions(is_masked, max(self.first_rate, self.last_rate))  # (N,) N is fixed
        return is_masked.nonzero().squeeze(1)  # (N,)

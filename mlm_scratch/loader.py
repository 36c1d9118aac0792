"""Epoch order, batches, padding, masking, hand-over to the device, position for resume.

The optimizer step is the unit here: its rows (batch_size x accumulate x processes) are padded and
masked in one go and only then split: into equal shares for the processes, and each share into
micro-batches. So 32 x 1, 8 x 4 and two processes with 16 see the same masks, and the number of
masked tokens of the whole step is known before its first backward pass.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.rows import TokenRows
from mlm_scratch.masking import IGNORE, mask_tokens, word_ids_from_gaps
from mlm_scratch.parallel.ranks import ALONE, Ranks


class Batch(NamedTuple):
    """What one forward pass needs.

    positions: (N,) indices in the flattened (B * T,) batch of the masked tokens, and with --compile
    of some more. They are found on the CPU, with the masks: how many there are decides the shapes
    that follow, and asking the GPU for a number makes the CPU wait until it has computed everything
    before. For the same reason attention_mask is None where nothing is padded: a model would look
    into it to find that out.
    """

    input_ids: Tensor  # (B, T) int64, as the model sees them
    attention_mask: Tensor | None  # (B, T) int64, 1 at tokens, 0 at padding
    labels: Tensor  # (B, T) int64, the id to predict, -100 where there is none
    positions: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`. Copies from pinned memory do not make the CPU wait: while the
        GPU works on this batch, the next one is prepared."""
        if device.type == "cpu":
            return self
        return Batch._make(
            None if tensor is None else tensor.pin_memory().to(device, non_blocking=True)
            for tensor in self
        )


class Collator:
    """Rows of token ids -> one padded and masked Batch, on the CPU.

    Owns the generator that all masks of a run are drawn from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig):
        self.config = config
        self.mask_token_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.pad_token_id = tokenizer.pad_token_id or 0  # any will do: attention_mask hides it
        # is_special[id] answers for a whole batch what get_special_tokens_mask does row by row
        largest_id = max(tokenizer.get_vocab().values())
        self.is_special = np.zeros(largest_id + 1, dtype=bool)  # (V,)
        self.is_special[tokenizer.all_special_ids] = True
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self, rows: TokenRows, indices: np.ndarray) -> Batch:
        """Pad rows[indices] to their longest, (B, T), and mask.

        Row i is rows.tokens[rows.starts[i] : rows.starts[i + 1]].
        """
        starts = rows.starts[indices]  # (B,)
        lengths = rows.starts[indices + 1] - starts  # (B,)
        columns = np.arange(lengths.max())  # (T,)
        is_token = columns < lengths[:, None]  # (B, T)
        source = np.where(is_token, starts[:, None] + columns, 0)  # (B, T) where each token lies
        ids = np.where(is_token, rows.tokens[source], self.pad_token_id)  # (B, T)

        special = torch.from_numpy(self.is_special[ids] | ~is_token)  # (B, T)
        input_ids = torch.from_numpy(ids.astype(np.int64))  # (B, T)
        attention_mask = None
        if not is_token.all():
            attention_mask = torch.from_numpy(is_token.astype(np.int64))  # (B, T)
        word_ids = None
        if rows.gap_before is not None:
            gap_before = torch.from_numpy(rows.gap_before[source])  # (B, T)
            word_ids = word_ids_from_gaps(gap_before, special)  # (B, T)
        input_ids, labels = mask_tokens(  # (B, T), (B, T)
            input_ids,
            special,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            mlm_probability=self.config.mlm_probability,
            mask_replace_prob=self.config.mask_replace_prob,
            random_replace_prob=self.config.random_replace_prob,
            word_ids=word_ids,
            generator=self.generator,
        )
        return Batch(input_ids, attention_mask, labels, self._positions(labels))

    def split(self, batch: Batch, own: range, batch_size: int) -> Iterator[Batch]:
        """Cut the rows `own` into batches of `batch_size` rows (the last may be shorter)."""
        for start in range(own.start, own.stop, batch_size):
            part = slice(start, min(start + batch_size, own.stop))
            labels, attention_mask = batch.labels[part], batch.attention_mask  # (rows, T), (B, T)
            if attention_mask is not None:
                attention_mask = attention_mask[part]  # (rows, T)
            yield Batch(batch.input_ids[part], attention_mask, labels, self._positions(labels))

    def _positions(self, labels: Tensor) -> Tensor:
        """(B, T) labels -> (N,) indices of the tokens to predict, in the flattened batch.

        A compiled model wants the same N every time. Then positions without a label, which the
        loss ignores, are added up to a number that chance does not exceed.
        """
        chosen = labels.flatten() != IGNORE  # (B * T,)
        if not self.config.compile:
            return chosen.nonzero().squeeze(1)  # (N,)
        total, share = len(chosen), self.config.mlm_probability
        count = math.ceil(total * share + 6 * math.sqrt(total * share * (1 - share)))
        count = max(count, int(chosen.sum()))  # whole words come in larger portions
        return chosen.to(torch.uint8).argsort(stable=True, descending=True)[:count]  # (N,)


@dataclass
class Step:
    """The data of one optimizer step."""

    batches: list[Batch]  # the micro-batches of this process, on the device
    n_masked: int  # tokens to predict, those of all processes
    n_tokens: int  # tokens without padding, those of all processes


class Loader:
    """All optimizer steps of a run, in order: step s is the (s % steps_per_epoch)-th of its epoch.

    The position of a run is the number of the next step and the state of the mask generator.
    """

    def __init__(
        self,
        rows: TokenRows,
        collator: Collator,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ):
        self.rows, self.collator, self.device, self.ranks = rows, collator, device, ranks
        self.batch_size, self.seed = config.batch_size, config.seed
        self.rows_per_step = config.batch_size * config.accumulate * ranks.size
        self.steps_per_epoch = math.ceil(len(rows) / self.rows_per_step)
        self.text_digest = rows.text_digest

    def state_dict(self) -> dict[str, Any]:
        """The position, without the number of the next step."""
        return {"mask_generator": self.collator.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the masks where `state_dict` was taken."""
        self.collator.generator.set_state(state["mask_generator"])

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield the steps first ... last - 1."""
        order = None
        for step in range(first, last):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if step_of_epoch == 0:
                # Here torch's DataLoader draws the base seed of its workers. Drawing it as well
                # keeps dropout in step with the reference.
                torch.empty((), dtype=torch.int64).random_()
            if step_of_epoch == 0 or order is None:
                order = epoch_order(len(self.rows), self.seed, epoch)  # (rows,)
            start = step_of_epoch * self.rows_per_step
            yield self._step(order[start : start + self.rows_per_step])

    def _step(self, indices: np.ndarray) -> Step:
        batch = self.collator(self.rows, indices)
        parts = own_batches(batch, self.collator, self.batch_size, self.ranks)
        return Step(
            batches=[part.to(self.device) for part in parts],
            n_masked=int((batch.labels != IGNORE).sum()),
            n_tokens=int((self.rows.starts[indices + 1] - self.rows.starts[indices]).sum()),
        )


def own_batches(batch: Batch, collator: Collator, batch_size: int, ranks: Ranks) -> Iterator[Batch]:
    """The micro-batches of this process, at least one, of all rows of a step."""
    own = own_rows(len(batch.labels), ranks)
    if not own:
        # The last step of an epoch may have fewer rows than processes. All have to take part in it;
        # this one does with a row in which nothing is asked for, so that its gradients are 0.
        own, batch = range(1), batch._replace(labels=torch.full_like(batch.labels, IGNORE))
    return collator.split(batch, own, batch_size)


def own_rows(n: int, ranks: Ranks) -> range:
    """Which of the n rows of a step this process computes: equal shares, in order; those of the
    last processes may be smaller, or empty."""
    share = math.ceil(n / ranks.size)
    return range(min(ranks.rank * share, n), min((ranks.rank + 1) * share, n))


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) the rows in the order of this epoch: a permutation that seed and epoch alone decide.

    Source: the order of Trainer's sampler, accelerate's SeedableRandomSampler.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(n, generator=generator).numpy()

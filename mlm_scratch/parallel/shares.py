"""Which rows of a step belong to which rank.

All rows of a step are masked together, on every rank alike, and only then shared: so masks and
losses do not depend on the number of ranks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_scratch.config import TrainConfig
from mlm_scratch.masking import IGNORE
from mlm_scratch.parallel.ranks import Ranks


class Share(NamedTuple):
    """One rank's share of a step.

    Attributes:
        rows: the rows of the step to compute, at least one.
        labels: (B, T), those of the whole step.
        n_masked: masked tokens of the step, those of all ranks.
    """

    rows: range
    labels: Tensor
    n_masked: int


def share_of_step(labels: Tensor, ranks: Ranks, *, complete: bool) -> Share:
    """Find this rank's share of a step.

    Args:
        labels: (B, T), those of the whole step.
        ranks: the ranks, as this one sees them.
        complete: whether the rows of all ranks are here; of a stream, each rank reads its own.
    """
    rows = own_rows(len(labels), ranks)
    counted = labels if complete else labels[rows.start : rows.stop]  # (rows, T)
    n_masked = (counted != IGNORE).sum()  # ()
    if not complete:
        ranks.all_reduce_sum(n_masked)
    if not rows:
        # DDP needs every rank in every step. The last step of an epoch may have fewer rows than
        # there are ranks; then one without rows computes a row without labels: zero gradient.
        rows, labels = range(1), torch.full_like(labels, IGNORE)
    return Share(rows, labels, int(n_masked))


def own_rows(n: int, ranks: Ranks) -> range:
    """Return this rank's share of n rows: equal and in order; the last may be short or empty."""
    share = math.ceil(n / ranks.size)
    return range(min(ranks.rank * share, n), min((ranks.rank + 1) * share, n))


def rows_per_step(config: TrainConfig, ranks: Ranks) -> int:
    """Return the number of rows of one optimizer step, those of all ranks."""
    return config.batch_size * config.accumulate * ranks.size

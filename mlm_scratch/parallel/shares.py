"""Which rows of a step belong to which rank.

Every rank masks all rows of a step in the same way and only then takes its share, so masks and
losses do not depend on the number of ranks.
"""

import math
from collections.abc import Callable

import torch

from mlm_scratch.config import OptimizationSettings
from mlm_scratch.loader import Batch, batch_of
from mlm_scratch.masking import IGNORE
from mlm_scratch.parallel.ranks import Ranks


def share_among(ranks: Ranks, *, complete: bool) -> Callable[[Batch], tuple[Batch, int]]:
    """Return the function with which a Loader takes this rank's rows from those of a step.

    Args:
        ranks: the ranks, as this rank sees them.
        complete: whether this rank has the rows of all ranks; from a stream, it reads only its own.
    """

    def share(step: Batch) -> tuple[Batch, int]:
        """Return this rank's rows, at least one, and the number of masked tokens of all ranks."""
        rows = own_rows(len(step.labels), ranks)
        own = step.rows(slice(rows.start, rows.stop))
        n_masked = torch.tensor(len(step.positions if complete else own.positions))  # ()
        if not complete:
            ranks.all_reduce_sum(n_masked)
        if not rows:
            # DDP needs every rank in every step. The last step of an epoch may have fewer rows than
            # there are ranks; then one without rows computes a row without labels: zero gradient.
            ids, mask, labels, _ = step.rows(slice(0, 1))
            own = batch_of(ids, mask, torch.full_like(labels, IGNORE))
        return own, int(n_masked)

    return share


def own_rows(n: int, ranks: Ranks) -> range:
    """Return this rank's share of n rows: equal and in order; the last may be short or empty."""
    share = math.ceil(n / ranks.size)
    return range(min(ranks.rank * share, n), min((ranks.rank + 1) * share, n))


def rows_per_step(settings: OptimizationSettings, ranks: Ranks) -> int:
    """Return the number of rows per optimizer step, summed over all ranks."""
    return settings.batch_size * settings.accumulate * ranks.size

"""The Loader of a run over a stream."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.rows import TokenRows
from mlm_scratch.data.stream import ShardedStream
from mlm_scratch.loader import Collator, Loader
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.parallel.shares import own_rows


class StreamLoader(Loader):
    """All optimizer steps of a run over a stream.

    The position of a run is that of the stream and the state of the mask generator.
    """

    complete = False  # each rank reads its own rows only

    def __init__(
        self,
        stream: ShardedStream,
        collator: Collator,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ):
        # A stream has all that Loader itself asks of rows: a length and a digest.
        super().__init__(stream, collator, config, device, ranks)  # type: ignore[arg-type]
        self.stream = stream

    def rows_of_steps(self, first: int, last: int) -> Iterator[tuple[TokenRows, np.ndarray]]:
        """Yield the rows of each step; all are of the same length, and those of other ranks zeros.

        Every rank draws the masks of the whole step. For that, the rows of the other ranks have to
        be there, but not their tokens.
        """
        n_rows, length = self.rows_per_step, self.config.block_size
        own = own_rows(n_rows, self.ranks)
        starts, indices = np.arange(n_rows + 1) * length, np.arange(n_rows)
        tokens = np.zeros((n_rows, length, 2), np.int32)  # (rows, T, 2)
        for received in itertools.islice(self.stream.own_rows_of_steps(), last - first):
            tokens[own.start : own.stop] = received  # (own rows, T, 2)
            ids, gap_before = tokens.reshape(-1, 2).T  # (rows * T,), (rows * T,)
            yield (
                TokenRows(ids, starts, gap_before > 0 if self.config.whole_word else None),
                indices,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return super().state_dict() | self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned."""
        super().load_state_dict(state)
        self.stream.load_state_dict(state)

"""Streaming a corpus larger than the disk: read, shuffle, tokenize and chunk it while training.

    stream    -> logical shards: each has its own files, or else every n-th document
    shard     -> buffers of documents, shuffled and tokenized, concatenated and chunked into rows
                 (by worker processes, some steps ahead)
    step      -> the same number of rows from every shard

There are usually 16 logical shards, and each rank reads an equal number of them. So a step has the
same rows for any number of ranks that divides the number of shards.
"""

import ctypes
import hashlib
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TextSettings, TrainConfig
from mlm_scratch.data.documents import Documents
from mlm_scratch.data.rows import Source, tokenize
from mlm_scratch.loader import Collator, Loader, TokenRows
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.parallel.shares import own_rows, rows_per_step
from mlm_scratch.util.errors import UserError

SHARDS = 16  # or a divisor of 16; more only if there are more ranks
PREFETCH_STEPS = 4
PR_SET_PDEATHSIG = 1  # name and number from Linux's prctl.h

# Where a shard continues: at row "row" of buffer number "buffer". The buffer consists of "left",
# the tokens left over from the previous buffer, and of the documents from "stream" on (a state_dict
# of the data set; None: its start).
Position = dict[str, Any]
START: Position = {"buffer": 0, "stream": None, "left": [], "row": 0}


class ShardedStream(Source):
    """The rows of a stream, step by step, endlessly.

    Its position consists of the positions of all shards. A shard that reaches its end starts over,
    independently of the others.
    """

    complete = False

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        ranks: Ranks = ALONE,
    ):
        self.documents, self.tokenizer, self.config = documents, tokenizer, config
        self.ranks, self.rows_per_step = ranks, rows_per_step(config.optimization, ranks)
        shards = math.gcd(self.rows_per_step, SHARDS)
        if shards % ranks.size > 0:
            shards = math.lcm(shards, ranks.size)
        if self.rows_per_step % shards > 0:
            shards = ranks.size
        self.positions = [START] * shards  # up to date only for this rank's shards
        self.text_digest = _digest(config.text)
        self.received: Iterator[Any] | None = None  # from the workers, while they run

    def __len__(self) -> int:
        """Count the rows of a run: as in Trainer, a stream is one epoch of max_steps steps."""
        return (self.config.optimization.max_steps or 0) * self.rows_per_step

    def loader(self, collator: Collator, **settings: Any) -> Loader:
        """Build a StreamLoader."""
        return StreamLoader(self, collator, **settings)

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all shards."""
        own = [self.positions[shard] for shard in self._own_shards()]
        return {"shards": list(itertools.chain.from_iterable(self.ranks.gather(own)))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore these positions. Raises UserError if the ranks cannot share the shards."""
        self.positions = state["shards"]
        if len(self.positions) % self.ranks.size > 0:
            raise UserError(
                f"--resume: this run reads its stream in {len(self.positions)} shards, which "
                f"{self.ranks.size} processes cannot share: use a divisor of that number"
            )

    def start(self) -> None:
        """Fork the worker processes, which continue from the current positions."""
        own = self._own_shards()
        cores = max(1, (os.cpu_count() or 1) // self.ranks.local_size)
        workers = max(n for n in range(1, cores + 1) if len(own) % n == 0)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core
        self.received = iter(
            DataLoader(  # yields from worker 0, 1, 2, ..., 0, 1, 2, ...
                _Shards(self, own),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=workers,
                prefetch_factor=PREFETCH_STEPS * len(own) // workers,
                worker_init_fn=_live_as_long_as_the_parent,
                generator=torch.Generator(),  # leaves the global one to dropout
            )
        )

    def own_rows_of_steps(self) -> Iterator[np.ndarray]:
        """Yield this rank's rows of each step, (own rows, T, 2), and advance the positions.

        The last axis holds a token's id and, with whole-word masking, whether a gap precedes it.
        """
        if self.received is None:
            self.start()
        while True:
            parts = []
            for shard in self._own_shards():
                part, self.positions[shard] = self._next()
                parts.append(part)
            yield np.concatenate(parts)

    def _own_shards(self) -> range:
        share = len(self.positions) // self.ranks.size
        return range(self.ranks.rank * share, (self.ranks.rank + 1) * share)

    def _next(self) -> tuple[np.ndarray, Position]:
        assert self.received is not None, "own_rows_of_steps has started the workers"
        item = next(self.received)
        if isinstance(item, UserError):
            raise item
        return item

    def close(self) -> None:
        """Stop the worker processes."""
        self.received = None


class StreamLoader(Loader):
    """All optimizer steps of a run over a stream.

    The position of a run consists of the stream's positions and the mask generator's state.
    """

    def __init__(self, stream: ShardedStream, collator: Collator, **settings: Any):
        # Loader itself needs only the number of rows.
        super().__init__(stream, collator, **settings)  # type: ignore[arg-type]
        self.stream = stream

    def rows_of_steps(self, first: int, last: int) -> Iterator[tuple[TokenRows, np.ndarray]]:
        """Yield the rows of each step, all of the same length; the rows of other ranks are zeros.

        Every rank draws the masks of the whole step, which takes the number of rows of the other
        ranks but not their tokens.
        """
        config = self.stream.config
        n_rows, length = self.rows_per_step, config.text.block_size
        own = own_rows(n_rows, self.stream.ranks)
        starts, indices = np.arange(n_rows + 1) * length, np.arange(n_rows)
        tokens = np.zeros((n_rows, length, 2), np.int32)  # (rows, T, 2)
        for received in itertools.islice(self.stream.own_rows_of_steps(), last - first):
            tokens[own.start : own.stop] = received  # (own rows, T, 2)
            ids, gap_before = tokens.reshape(-1, 2).T  # (rows * T,), (rows * T,)
            yield (
                TokenRows(ids, starts, gap_before > 0 if config.masking.whole_word else None),
                indices,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the run."""
        return super().state_dict() | self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned."""
        super().load_state_dict(state)
        self.stream.load_state_dict(state)


class _Shards(IterableDataset):
    """The shards of one rank: worker w of the DataLoader's W reads shards w, w + W, …, in turn."""

    def __init__(self, stream: ShardedStream, own: range):
        self.documents, self.tokenizer = stream.documents, stream.tokenizer
        self.config, self.positions, self.own = stream.config, stream.positions, own
        self.rows_per_shard = stream.rows_per_step // len(stream.positions)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Position] | UserError]:
        """Yield a step's rows, (rows_per_shard, T, 2), and the position after them, shard by shard.

        The iterator is endless. An error is yielded, not raised: DataLoader would add a traceback
        to its message.
        """
        worker = get_worker_info()
        assert worker is not None, "a DataLoader iterates over this, in its workers"
        shards = [self._rows(shard) for shard in self.own[worker.id :: worker.num_workers]]
        try:
            for rows in itertools.cycle(shards):
                of_step, positions = zip(*itertools.islice(rows, self.rows_per_shard), strict=True)
                yield np.stack(of_step), positions[-1]
        except UserError as error:
            yield error

    def _rows(self, shard: int) -> Iterator[tuple[np.ndarray, Position]]:
        """Yield each row, (T, 2), and the position after it, endlessly."""
        at, length = self.positions[shard], self.config.text.block_size
        seed = self.config.optimization.seed
        while True:
            documents = self.documents.shard(shard, len(self.positions))
            has_text = at["stream"] is not None
            if has_text:
                documents.rows.load_state_dict(at["stream"])
            for texts in documents.batches():
                has_text = has_text or any(text.strip() for text in texts)
                shuffle = np.random.default_rng((seed, shard, at["buffer"]))
                tokens = self._tokens([texts[i] for i in shuffle.permutation(len(texts))], at)
                whole_rows = len(tokens) // length
                for row in range(at["row"], whole_rows):
                    yield tokens[row * length : (row + 1) * length], {**at, "row": row + 1}
                at = {
                    "buffer": at["buffer"] + 1,
                    "stream": documents.rows.state_dict(),
                    "left": tokens[whole_rows * length :].tolist(),
                    "row": 0,
                }
            if not has_text:
                raise UserError(
                    f"{documents.source} has too little text for {len(self.positions)} shards: "
                    "drop --streaming"
                )
            at = {**at, "stream": None}

    def _tokens(self, texts: list[str], at: Position) -> np.ndarray:
        """Return the left-over tokens followed by the tokens of `texts`, (n, 2)."""
        parts = [np.array(at["left"], np.int32).reshape(-1, 2)]  # (left, 2)
        for ids, gap_before in tokenize(texts, self.tokenizer, self.config):
            part = np.zeros((len(ids), 2), np.int32)
            part[:, 0] = ids
            part[:, 1] = gap_before or 0
            parts.append(part)
        return np.concatenate(parts)


def _as_it_is(item: Any) -> Any:
    return item


def _live_as_long_as_the_parent(worker: int) -> None:
    """Ignore signals to the process group, but die with the training process.

    A signal from a terminal or torchrun is meant for the training process, which has to finish its
    step. When that process dies, no worker may keep its lock and sockets open.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # DataLoader stops workers with it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _digest(text: TextSettings) -> str:
    """Digest what is known of a stream without reading it, wherever it lies.

    That is the size and the first mebibyte of its files, or the name of a data set.
    """
    files = [*map(Path, text.train_file)]
    if not files and text.dataset and os.path.isdir(text.dataset):
        files = sorted(path for path in Path(text.dataset).rglob("*") if path.is_file())
    name = text.dataset if not files else None
    digest = hashlib.sha256(json.dumps([name, text.dataset_config, text.split]).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(path.stat().st_size.to_bytes(8, "little") + file.read(2**20))
    return digest.hexdigest()

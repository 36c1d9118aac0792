"""A corpus that does not fit a disk: read, shuffled, tokenized and packed while the model trains.

    stream    -> lanes: each has its own files, or else every so many-th document
    lane      -> a buffer of documents, shuffled, their ids one after the other, cut into rows
                 (by worker processes, some steps ahead)
    step      -> the same number of rows from every lane

There are 16 lanes in most cases, and each process of a run has its share of them. So what is in a
step does not depend on the number of processes, as long as they divide the lanes.
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
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.rows import Documents, TokenRows, tokenize
from mlm_scratch.loader import Collator, Step, own_batches, own_rows
from mlm_scratch.masking import IGNORE
from mlm_scratch.parallel.ranks import Ranks
from mlm_scratch.util.errors import UserError

LANES = 16  # or a divisor of that; more only where there are more processes
STEPS_AHEAD = 4
PR_SET_PDEATHSIG = 1  # name and number of Linux's prctl.h

# Where a lane goes on: at row "row" of its buffer number "buffer". Its documents are read at
# "stream" (what the data set calls its state; None: its beginning), and the tokens "left" by the
# buffer before come first.
Position = dict[str, Any]
BEGINNING: Position = {"buffer": 0, "stream": None, "left": [], "row": 0}


class StreamLoader:
    """All optimizer steps of a run over a stream; for text on disk Loader has the same methods.

    The position of a run is that of every lane and the state of the mask generator. A lane that
    comes to its end begins anew, wherever the others are.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks,
    ):
        self.documents, self.tokenizer, self.config = documents, tokenizer, config
        self.collator, self.device, self.ranks = Collator(tokenizer, config), device, ranks
        self.rows_per_step = config.batch_size * config.accumulate * ranks.size
        lanes = math.gcd(self.rows_per_step, LANES)
        if lanes % ranks.size > 0:
            lanes = math.lcm(lanes, ranks.size)
        if self.rows_per_step % lanes > 0:
            lanes = ranks.size
        self.positions = [BEGINNING] * lanes  # kept up to date for the own ones
        self.steps_per_epoch = config.max_steps or 0  # as Trainer counts a stream: one epoch in all
        self.text_digest = _digest(config)
        self.received: Iterator[Any] = iter(())  # from the workers, while there are any

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        own = [self.positions[lane] for lane in self._own_lanes()]
        return {
            "lanes": list(itertools.chain.from_iterable(self.ranks.gather(own))),
            "mask_generator": self.collator.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises UserError where the lanes cannot be shared out."""
        self.positions = state["lanes"]
        if len(self.positions) % self.ranks.size > 0:
            raise UserError(
                f"--resume: this run reads its stream in {len(self.positions)} lanes, which "
                f"{self.ranks.size} processes cannot share: take a divisor of that number"
            )
        self.collator.generator.set_state(state["mask_generator"])

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield the steps first ... last - 1."""
        n_rows, length = self.rows_per_step, self.config.block_size
        own = own_rows(n_rows, self.ranks)
        # Every process draws the masks of the whole step. For that the rows of the others have to
        # be there, but not what is in them.
        tokens = np.zeros((n_rows, length, 2), np.int32)  # (rows, T, 2)
        for received in itertools.islice(self._read_ahead(), last - first):
            tokens[own.start : own.stop] = received
            ids, gap_before = tokens.reshape(-1, 2).T  # (rows * T,), (rows * T,)
            rows = TokenRows(
                ids,
                starts=np.arange(n_rows + 1) * length,
                gap_before=gap_before > 0 if self.config.whole_word else None,
            )
            batch = self.collator(rows, np.arange(n_rows))
            own_labels = batch.labels[own.start : own.stop]  # (own rows, T)
            n_masked = torch.tensor(int((own_labels != IGNORE).sum()))  # () on the CPU
            batches = own_batches(batch, self.collator, self.config.batch_size, self.ranks)
            yield Step(
                batches=[part.to(self.device) for part in batches],
                n_masked=int(self.ranks.add_up(n_masked)),
                n_tokens=n_rows * length,
            )

    def _own_lanes(self) -> range:
        share = len(self.positions) // self.ranks.size
        return range(self.ranks.rank * share, (self.ranks.rank + 1) * share)

    def _read_ahead(self) -> Iterator[np.ndarray]:
        """Yield the own rows of one step after the other, (own rows, T, 2), and keep the positions
        after them."""
        own = self._own_lanes()
        cores = max(1, (os.cpu_count() or 1) // self.ranks.launch.local_size)
        workers = max(n for n in range(1, cores + 1) if len(own) % n == 0)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core
        self.received = iter(
            DataLoader(  # yields from worker 0, 1, 2, ..., 0, 1, 2, ...
                _Lanes(self, own),
                batch_size=None,
                collate_fn=lambda item: item,
                num_workers=workers,
                prefetch_factor=STEPS_AHEAD * len(own) // workers,
                worker_init_fn=_live_as_long_as_the_parent,
                generator=torch.Generator(),  # dropout is drawn from torch's own, and nothing else
            )
        )
        while True:
            parts = []
            for lane in own:
                part, self.positions[lane] = self._next()
                parts.append(part)
            yield np.concatenate(parts)

    def _next(self) -> tuple[np.ndarray, Position]:
        item = next(self.received)
        if isinstance(item, UserError):
            raise item
        return item

    def close(self) -> None:
        """End the worker processes."""
        self.received = iter(())


class _Lanes(IterableDataset):
    """The lanes of one process. Of W workers of a DataLoader number w has w, w + W, w + 2 W, ..."""

    def __init__(self, loader: StreamLoader, own: range):
        self.documents, self.tokenizer, self.config = (
            loader.documents,
            loader.tokenizer,
            loader.config,
        )
        self.positions, self.own = loader.positions, own
        self.rows_per_lane = loader.rows_per_step // len(loader.positions)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Position] | UserError]:
        """Yield the rows of a step, (rows_per_lane, T, 2), and the position after them, from one
        lane after the other; for ever.

        An error is handed over: raised, the DataLoader would put a traceback into its message.
        """
        worker = get_worker_info()
        assert worker is not None, "a DataLoader iterates over this, in its workers"
        lanes = [self._rows(lane) for lane in self.own[worker.id :: worker.num_workers]]
        try:
            for rows in itertools.cycle(lanes):
                of_step, positions = zip(*itertools.islice(rows, self.rows_per_lane), strict=True)
                yield np.stack(of_step), positions[-1]
        except UserError as error:
            yield error

    def _rows(self, lane: int) -> Iterator[tuple[np.ndarray, Position]]:
        """Yield each row, (T, 2), and the position after it; for ever."""
        at, length = self.positions[lane], self.config.block_size
        while True:
            documents = self.documents.part(lane, len(self.positions))
            has_text = at["stream"] is not None
            if has_text:
                documents.rows.load_state_dict(at["stream"])
            for texts in documents.batches():
                has_text = has_text or any(text.strip() for text in texts)
                shuffle = np.random.default_rng((self.config.seed, lane, at["buffer"]))
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
                    f"{documents.source} has too little text for {len(self.positions)} lanes: "
                    "leave --streaming out"
                )
            at = {**at, "stream": None}

    def _tokens(self, texts: list[str], at: Position) -> np.ndarray:
        """(n, 2): each token's id and, with whole words, whether the text has a gap before it."""
        parts = [np.array(at["left"], np.int32).reshape(-1, 2)]  # (left, 2)
        for ids, gap_before in tokenize(texts, self.tokenizer, self.config):
            part = np.zeros((len(ids), 2), np.int32)
            part[:, 0] = ids
            part[:, 1] = gap_before or 0
            parts.append(part)
        return np.concatenate(parts)


def _live_as_long_as_the_parent(worker: int) -> None:
    """Leave signals to the whole group, from a terminal or torchrun, to the process that trains:
    it has to finish its step. And die when that dies: its open lock and sockets are here too."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the DataLoader ends a worker
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _digest(config: TrainConfig) -> str:
    """What can be known of a stream without reading it: its name, and the sizes of its files."""
    names = [config.dataset, config.dataset_config, config.split]
    sizes = [(os.path.basename(path), os.path.getsize(path)) for path in config.train_file]
    return hashlib.sha256(json.dumps([names, sizes]).encode()).hexdigest()

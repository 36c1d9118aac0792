"""Estimate what a step costs on 8, 64 and 1,024 GPUs, and what bounds it.

    python -m tests.tools.plan --model distilbert/distilroberta-base

Computed from the shape of a model, the data sheets of a GPU and its network, and four small
measurements on this machine: how long it takes to draw masks, draw an epoch order, compute a
checksum, and agree on a number over gloo. Nothing is measured on a GPU. Takes about 10 seconds.
"""

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed, multiprocessing
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from mlm_scratch.loader import Collator, TokenRows, epoch_order
from mlm_scratch.model import MaskedLM
from mlm_scratch.speed.flops import StepFlops

BLOCK = 128
ROWS_PER_GPU = 256
LARGEST_STEP = 2**22  # tokens: BERT and RoBERTa were trained with 8,000 rows of 512
GPUS_PER_NODE = 8
RATE = 989e12  # FLOP/s of an H100 or H200 SXM in bf16 (data sheet)
UTILIZATION = 0.4  # of that, in training (assumed)
NVLINK, NETWORK = 450e9, 50e9  # bytes/s per GPU and direction (data sheet; 400 Gbit/s)
DISK = 1e9  # bytes/s (assumed)
ROWS_ON_DISK = 1_000_000_000  # of a large corpus: 128 G tokens


@dataclass
class Measured:
    """Seconds on this machine."""

    mask: float  # to mask, per token
    order: float  # to draw an epoch order, per row
    digest: float  # to compute a checksum, per byte
    agree: float  # to agree on one number over gloo, per process passed


def measure(tokenizer: PreTrainedTokenizerBase) -> Measured:
    """Take the four measurements."""
    rows = TokenRows(
        np.random.default_rng(0).integers(5, len(tokenizer), 256 * BLOCK).astype(np.uint16),
        np.arange(257) * BLOCK,
    )
    collator, data = Collator(tokenizer), bytes(2**28)
    return Measured(
        mask=_fastest(lambda: collator(rows, np.arange(256))) / (256 * BLOCK),
        order=_fastest(lambda: epoch_order(10**7, 0, 0)) / 10**7,
        digest=_fastest(lambda: hashlib.sha256(data)) / len(data),
        agree=_agreement(),
    )


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def _agreement() -> float:
    """Measure with two processes: each number passes 2 x (2 - 1) of them."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "WORLD_SIZE": "2"}
    multiprocessing.start_processes(_agree, (results,), nprocs=2, start_method="spawn")
    return results.get() / 2


def _agree(rank: int, results: Any) -> None:
    distributed.init_process_group("gloo", rank=rank)
    number = torch.zeros(())  # ()
    times = _fastest(lambda: [distributed.all_reduce(number) for _ in range(1000)])
    if rank == 0:
        results.put(times / 1000)
    distributed.barrier()


def plan(
    gpus: int, parameters: int, flops_per_token: float, measured: Measured
) -> dict[str, float]:
    """Return what one step of `gpus` GPUs costs: bytes and times."""
    rows = min(ROWS_PER_GPU, LARGEST_STEP // BLOCK // gpus)  # per GPU
    tokens = gpus * rows * BLOCK
    # A ring of N sends each of N parts of the fp32 gradients around twice, all but one hop.
    sent = 2 * (gpus - 1) / gpus * 4 * parameters
    wire = NVLINK if gpus <= GPUS_PER_NODE else NETWORK
    compute = flops_per_token * rows * BLOCK / (RATE * UTILIZATION)
    state = 12 * parameters + 5056 * gpus  # weights, two moments of AdamW; random state per rank
    return {
        "rows per GPU": rows,
        "tokens in a step": tokens,
        "computing, ms": compute * 1e3,
        "sent by each GPU, MB": sent / 1e6,
        "sending that, ms": sent / wire * 1e3,
        "drawing all masks of the step in each process, ms": tokens * measured.mask * 1e3,
        "drawing only its own, ms": tokens / gpus * measured.mask * 1e3,
        "agreeing on a stop signal, ms": 2 * (gpus - 1) * measured.agree * 1e3,
        "checkpoint, GB": state / 1e9,
        "writing it and reading it twice for its checksums, s": state / DISK
        + 2 * state * measured.digest,
        "order of an epoch of 10^9 rows in each process, GB": 8 * ROWS_ON_DISK / 1e9,
        "drawing that, s": ROWS_ON_DISK * measured.order,
        "steps in that epoch": ROWS_ON_DISK * BLOCK / tokens,
    }


def main() -> None:
    """Print the plan as a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="ID_OR_DIR", help="shape to compute for")
    arguments = parser.parse_args()
    with torch.device("meta"):  # only its shape
        model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(arguments.model))
    measured = measure(AutoTokenizer.from_pretrained(arguments.model))
    print(measured)
    tokens = ROWS_PER_GPU * BLOCK
    flops = StepFlops(MaskedLM(model)).count(tokens, BLOCK, round(0.15 * tokens)) / tokens
    plans = [plan(gpus, model.num_parameters(), flops, measured) for gpus in (8, 64, 1024)]
    print("| GPUs | 8 | 64 | 1,024 |\n|---|---|---|---|")
    for name in plans[0]:
        values = [f"{p[name]:,.0f}" if p[name] > 100 else f"{p[name]:.2g}" for p in plans]
        print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()

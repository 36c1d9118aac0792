"""Measure how training scales: with two ranks, and with streams.

    python -m tests.tools.scale --model distilbert/distilroberta-base --text questions.jsonl.gz

Compares whole runs of train.py by the tokens per second that they log, alternating between both,
A B A B ..., and then streams a large generated text and prints the memory on the way. Only ratios
mean something: speed depends on what else runs. Takes about 25 minutes on 2 cores for
distilroberta's shape, 3 minutes with --steps 4 --repeats 1 --gigabytes 0.01.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlm_scratch.data.documents import TEXTS_PER_BATCH, load_documents
from mlm_scratch.data.stream import ShardedStream
from mlm_scratch.hf.load import load_tokenizer
from mlm_scratch.loader import Collator
from tests.support.fact_prompts import EMITTED
from tests.tools.bench import memory_of_process, tutorial_shape

ROOT = Path(__file__).parents[2]


def tokens_per_second(
    arguments: argparse.Namespace, processes: int, threads: int, *flags: str
) -> float:
    """Return the median of what one run logs, its first steps left out."""
    command: list[Any] = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [
        ROOT / "train.py",
        *("--model", arguments.model),
        *("--init", "scratch"),
        *("--train-file", arguments.text),
        *("--text-column", arguments.text_column),
        *("--eval-fraction", 0),
        *("--batch-size", arguments.batch_size // processes),
        *("--max-steps", arguments.steps),
        *("--log-every", 2),
        *("--save-every", 0),
        *("--device", "cpu"),
        *flags,
    ]
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            list(map(str, command)), cwd=directory, check=True, capture_output=True, env=environment
        )
        events = EventAccumulator(f"{directory}/runs/tutorial/logs")
        events.Reload()
        return statistics.median(
            event.value for event in events.Scalars("train/tokens_per_second")[1:]
        )


def compare(arguments: argparse.Namespace, name: str, ours: tuple, other: tuple) -> None:
    """Print the ratio of two kinds of run."""
    pairs = [
        (tokens_per_second(arguments, *ours), tokens_per_second(arguments, *other))
        for _ in range(arguments.repeats)
    ]
    ratios = [a / b for a, b in pairs]
    medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
    print(
        f"{name:60} {medians[0]:8,.0f} {medians[1]:8,.0f} tokens/s "
        f"{statistics.median(ratios):6.2f}x   {min(ratios):.2f} to {max(ratios):.2f}",
        flush=True,
    )


def stream_memory(model: str, gigabytes: float, directory: Path) -> None:
    """Stream a generated text of this size and print the memory on the way.

    That of this process and its workers, without the pages of mapped files.
    """
    text, size, documents = directory / "text.jsonl", 0, 0
    facts = " ".join(prompt.replace("<mask>", truth) for prompt, truth in EMITTED)
    with text.open("w") as file:
        while size < gigabytes * 1e9:
            size += file.write(json.dumps({"text": f"{documents} {facts}"}) + "\n")
            documents += 1
    config = tutorial_shape(model, str(text), "text", streaming=True, batch_size=256)
    tokenizer = load_tokenizer(model)
    stream = ShardedStream(load_documents(config)[0], tokenizer, config)
    size_of_step = {
        "rows_per_step": stream.rows_per_step,
        "batch_size": config.optimization.batch_size,
    }
    loader = stream.loader(Collator(tokenizer), **size_of_step)
    buffers = math.ceil(documents / len(stream.positions) / TEXTS_PER_BATCH)  # of each shard
    begin, tokens, printed = time.perf_counter(), 0, 0
    for step in loader.steps(0, 10**9):
        tokens += step.n_tokens
        done = min(position["buffer"] for position in stream.positions) / buffers
        if done >= printed / 20:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            memory = sum(memory_of_process("RssAnon", pid) for pid in ("self", *children))
            seconds = time.perf_counter() - begin
            print(
                f"{done:5.0%} of {size / 1e9:.2g} GB: {memory / 2**20:,.0f} MiB, "
                f"{tokens / seconds:,.0f} tokens/s",
                flush=True,
            )
            printed = math.floor(done * 20) + 1
        if done >= 1:
            break
    stream.close()


def main() -> None:
    """Print all measurements."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="ID_OR_DIR",
        help="shape and tokenizer to measure with; its weights are not used",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="text to measure with")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per step (8)")
    parser.add_argument(
        "--steps", type=int, default=12, metavar="N", help="training steps of a run (12)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="pairs of runs (3)")
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, metavar="X", help="size of the generated text (2)"
    )
    arguments = parser.parse_args()
    arguments.text = os.path.abspath(arguments.text)
    if os.path.exists(arguments.model):
        arguments.model = os.path.abspath(arguments.model)
    comparisons: tuple[tuple[str, tuple, tuple], ...] = (
        ("2 processes of 1 thread, 1 process of 2 threads", (2, 1), (1, 2)),
        ("2 processes of 1 thread, 1 process of 1 thread", (2, 1), (1, 1)),
        ("--streaming, memory-mapped rows", (1, 2, "--streaming"), (1, 2)),
    )
    for name, ours, other in comparisons:
        compare(arguments, name, ours, other)
    with tempfile.TemporaryDirectory() as directory:
        stream_memory(arguments.model, arguments.gigabytes, Path(directory))


if __name__ == "__main__":
    main()

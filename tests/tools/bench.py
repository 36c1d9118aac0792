"""Compare the speed and memory of this project with those of Hugging Face's own classes.

    python -m tests.tools.bench --model distilbert/distilroberta-base --text questions.jsonl.gz

Training steps and their peak memory (against Trainer), batches (against
DataCollatorForLanguageModeling), tokenizing (against datasets.map), grouping (against the
tutorial's function) and infer.py (against the pipeline). Each comparison alternates between both,
A B A B ..., and prints the median, lowest and highest ratio. Only ratios mean something: seconds
depend on what else runs. Takes about 10 minutes on 2 cores for distilroberta's shape, 2 minutes
with --steps 1 --repeats 1.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mlm_scratch.config import TrainConfig, resolve
from mlm_scratch.data.documents import load_documents
from mlm_scratch.data.rows import PreparedRows as TokenRows
from mlm_scratch.data.rows import prepare_rows, tokenize, write_rows
from mlm_scratch.hf.load import load_model
from mlm_scratch.loader import Collator, Step
from mlm_scratch.parallel.ranks import ALONE
from mlm_scratch.precision import choose_precision
from mlm_scratch.report.log import NoReport
from mlm_scratch.run.build import adapt, prepare
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.run.steps import run_steps
from mlm_scratch.speed.allocator import THREAD_CACHE_OFF
from mlm_scratch.speed.flops import StepFlops, peak_rate

ROOT = Path(__file__).parents[2]
PIPELINE = """
import sys
from transformers import pipeline
print(pipeline("fill-mask", model=sys.argv[1])(sys.argv[2]))
"""


# ---- The work, by us and by Hugging Face ---------------------------------------------------------


class Clock(NoReport):
    """The report of a run that only records when each step was done."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def advance(self, step: Step) -> None:
        """Record the time."""
        self.now()

    def now(self) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())


def our_steps(settings: str, steps: str) -> float:
    """Measure the seconds per optimizer step of the loop; `settings` are those of a run in JSON."""
    t = prepare(tutorial_shape(**json.loads(settings)))
    clock, all_steps = Clock(), t.loader.steps
    t.total_steps = int(steps) + 2
    # Without the last step, which would be saved.
    t.loader.steps = lambda first, last: all_steps(first, last - 1)  # type: ignore[method-assign]
    run_steps(t, clock, StopRequest())
    return seconds_per_step(clock, t.precision.device)


def seconds_per_step(clock: Clock, device: torch.device) -> float:
    """Return the median over all steps but the first, which allocates; on a GPU their mean.

    On a GPU, the time of a single step would be that of its launch.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        return (time.perf_counter() - clock.times[1]) / (len(clock.times) - 2)
    return float(np.median(np.diff(clock.times)[1:]))


class StepTimes(TrainerCallback):
    """Records when Trainer has done each step."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the time."""
        self.clock.now()


def trainer_steps(settings: str, steps: str) -> float:
    """Measure the seconds per optimizer step of Trainer; `settings` as in `our_steps`."""
    config = tutorial_shape(**json.loads(settings))
    times = StepTimes()
    run_trainer(config, int(steps) + 1, times)
    return seconds_per_step(
        times.clock, choose_precision(config.machine.device, config.machine.precision).device
    )


def run_trainer(config: TrainConfig, steps: int, callback: TrainerCallback) -> None:
    """Run this many steps of Trainer with the settings, text and random weights of `config`."""
    precision = choose_precision(config.machine.device, config.machine.precision)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    rows = prepare_rows(load_documents(config)[0], tokenizer, config)
    with tempfile.TemporaryDirectory() as directory:
        Trainer(
            model=load_model(config.model.name, "scratch"),
            args=TrainingArguments(
                directory,
                max_steps=steps,
                per_device_train_batch_size=config.optimization.batch_size,
                learning_rate=config.optimization.lr,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=precision.device.type == "cpu",
                bf16=precision.dtype == torch.bfloat16,
                fp16=precision.dtype == torch.float16,
                logging_steps=10_000,
            ),
            train_dataset=examples_of(rows, steps * config.optimization.batch_size),
            data_collator=DataCollatorForLanguageModeling(tokenizer, seed=config.optimization.seed),
            callbacks=[callback],
        ).train()


def tutorial_grouping(examples: dict[str, list[list[int]]], block_size: int) -> dict:
    """Do what the tutorial does to 1,000 documents: add up all lists, chunk the sum."""
    joined = {key: sum(lists, []) for key, lists in examples.items()}  # noqa: RUF017
    total = len(joined["input_ids"]) // block_size * block_size
    blocks = {
        key: [ids[i : i + block_size] for i in range(0, total, block_size)]
        for key, ids in joined.items()
    }
    return blocks | {"labels": blocks["input_ids"].copy()}


# ---- Measuring -----------------------------------------------------------------------------------


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Measure the seconds that `work` takes, the mean of `times` calls."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> dict:
    """Measure A B A B ..., after a warm-up of both."""
    ours(), theirs()
    return summary([(ours(), theirs()) for _ in range(repeats)])


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return the medians of (ours, theirs) and of the ratio theirs / ours, with its range."""
    ratios = [theirs / ours for ours, theirs in pairs]
    return {
        "ours": statistics.median(ours for ours, _ in pairs),
        "theirs": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def matrix_rate(device: torch.device, dtype: torch.dtype, positions: int) -> float:
    """Measure the FLOP/s of matrix products alone: the best of 20.

    That of the encoder's largest layer on a batch. On a GPU, where such a product may take no
    longer than its launch, a large square one, too.
    """
    shapes = [(positions, 768, 3072)] + [(8192, 8192, 8192)] * (device.type == "cuda")
    best = 0.0
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(inner, columns, device=device, dtype=dtype)
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(10):
                a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            rate = 10 * 2 * rows * inner * columns / (time.perf_counter() - start)
            best = max(best, rate)
    return best


def in_a_process(function: str, *arguments: str, **environment: str) -> list[float]:
    """Call a function of this module in its own process.

    Returns:
        the numbers that it prints, the one that it returns (seconds), and the peak memory of the
        process in bytes.
    """
    code = (
        "import sys; from tests.tools import bench;"
        f"print(bench.{function}(*sys.argv[1:]));"
        "print(bench.memory_of_process('VmHWM'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return [float(line) for line in result.stdout.splitlines() if re.fullmatch(r"[\d.e+-]+", line)]


# ---- The comparisons -----------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yield the name and the result of every comparison."""
    repeats = arguments.repeats
    settings = {
        "model": arguments.model,
        "text": arguments.text,
        "column": arguments.text_column,
        "device": arguments.device,
        "precision": arguments.precision,
        "batch_size": arguments.batch_size,
    }
    config = tutorial_shape(**settings)
    documents, _ = load_documents(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    texts = list(documents)

    with tempfile.TemporaryDirectory() as directory:
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(directory)
        mapped = datasets.Dataset.load_from_disk(directory)  # as load_dataset leaves them
        yield (
            "tokenizing (datasets.map)",
            in_turn(
                lambda: seconds(lambda: sum(1 for _ in tokenize(documents, tokenizer, config))),
                lambda: seconds(lambda: tokenize_with_map(mapped, tokenizer)),
                max(1, repeats // 2),
            ),
        )

    encoded = [
        dict(tokenizer(texts[i : i + 1000], verbose=False)) for i in range(0, len(texts), 1000)
    ]
    ids = [batch["input_ids"] for batch in encoded]
    yield (
        "grouping (the tutorial's)",
        in_turn(
            lambda: seconds(lambda: group(ids)),
            lambda: seconds(lambda: [tutorial_grouping(batch, 128) for batch in encoded]),
            max(1, repeats // 2),
        ),
    )

    rows = prepare_rows(documents, tokenizer, config)
    examples = examples_of(rows, 2000)
    for size in (8, 256):
        collator = Collator(tokenizer)
        hf_collator = DataCollatorForLanguageModeling(tokenizer, seed=42)
        indices, part = np.arange(size), examples[:size]
        times = 2000 // size
        yield (
            f"batch of {size} x 128 (collator)",
            in_turn(
                lambda: seconds(lambda: collator(rows, indices), times),  # noqa: B023
                lambda: seconds(lambda: hf_collator([dict(e) for e in part]), times),  # noqa: B023
                repeats,
            ),
        )

    memory: dict[str, list[float]] = {"our_steps": [], "trainer_steps": []}

    def steps_in_a_process(function: str) -> float:
        """Measure each in its own processes: the allocator's settings must not leak."""
        environment = {"GLIBC_TUNABLES": THREAD_CACHE_OFF} if function == "our_steps" else {}
        *_, took, peak = in_a_process(
            function, json.dumps(settings), str(arguments.steps), **environment
        )
        memory[function].append(peak)
        return took

    step = in_turn(
        lambda: steps_in_a_process("our_steps"),
        lambda: steps_in_a_process("trainer_steps"),
        repeats,
    )
    precision = choose_precision(config.machine.device, config.machine.precision)
    model = adapt(load_model(config.model.name, "scratch"), config, ALONE)
    masked = round(
        config.masking.rates[0] * config.optimization.batch_size * config.text.block_size
    )
    tokens = config.optimization.batch_size * config.text.block_size
    flops = StepFlops(model).count(tokens, config.text.block_size, masked)
    with precision.tf32():
        rate = matrix_rate(precision.device, precision.dtype, tokens)
    peak = peak_rate(precision)
    yield (
        "training step (Trainer)",
        step
        | {
            "tokens_per_second": tokens / step["ours"],
            "roofline_share": flops / step["ours"] / rate,
            "matrix_flops_per_second": rate,
            "mfu": flops / step["ours"] / peak if peak else None,
        },
    )

    if precision.device.type == "cpu":
        pairs = list(zip(memory["our_steps"], memory["trainer_steps"], strict=True))
        yield "peak memory (Trainer)", summary(pairs)

    with tempfile.TemporaryDirectory() as directory:
        load_model(config.model.name, "scratch").save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        text = f"The Milky Way is a {tokenizer.mask_token} galaxy."
        yield (
            "start to fills (pipeline)",
            in_turn(
                lambda: run("infer.py", "--json", "--model", directory, text),
                lambda: run("-c", PIPELINE, directory, text),
                repeats,
            ),
        )


def tokenize_with_map(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenize as the tutorial does: by datasets.map in batches, a process per core."""
    rows.map(
        lambda part: tokenizer(part["text"]),
        batched=True,
        num_proc=os.cpu_count(),
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )


def group(ids: list[list[list[int]]]) -> None:
    """Write the ids of all documents to one file."""
    with tempfile.TemporaryDirectory() as directory:
        documents: Iterator[tuple[list[int], list[bool]]] = (
            (document, []) for batch in ids for document in batch
        )
        write_rows(Path(directory) / "rows", documents, largest_id=50_264)


def growth(texts: list[str], model: str) -> Iterator[dict]:
    """Prepare 1, 4 and 16 times the text, twice each: the second time from the cache."""
    for factor in (1, 4, 16):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "text.jsonl"
            with path.open("w") as file:
                for copy in range(factor):  # numbered, so that no two copies are equal
                    file.writelines(json.dumps({"text": f"{copy} {t}"}) + "\n" for t in texts)
            environment = {"MLM_SCRATCH_CACHE": directory, "HF_DATASETS_CACHE": directory}
            own, took, peak = in_a_process("prepare_text", model, str(path), **environment)
            _, again, _ = in_a_process("prepare_text", model, str(path), **environment)
            yield {
                "factor": factor,
                "seconds": took,
                "peak_memory": peak,
                "own_memory": own,
                "again": again,
            }


def prepare_text(model: str, path: str) -> float:
    """Measure the seconds from a file to rows of ids; print the peak of private memory.

    That excludes pages of mapped files, which the system reclaims when it needs space.
    """
    config = tutorial_shape(model, path, "text")
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        """Read the memory every 5 ms."""
        while not done.wait(0.005):
            samples.append(memory_of_process("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        return seconds(lambda: prepare_rows(load_documents(config)[0], tokenizer, config))
    finally:
        done.set()
        thread.join()
        print(max(samples, default=memory_of_process("RssAnon")))


def memory_of_process(field: str, process: str = "self") -> int:
    """Return a field of /proc/<process>/status in bytes.

    VmHWM is the peak (ru_maxrss is inherited by child processes), RssAnon the current memory
    without mapped files.
    """
    status = Path(f"/proc/{process}/status").read_text()
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+)", status)
    return int(kilobytes) * 1024


def tutorial_shape(model: str, text: str, column: str, **settings: Any) -> TrainConfig:
    """Return the tutorial's settings for another text, with random weights."""
    return resolve(
        "tutorial",
        {
            "model": model,
            "init": "scratch",
            "train_file": (text,),
            "text_column": column,
            "eval_fraction": 0.0,
            "device": "cpu",
            "max_steps": 100_000,
            "log_every": 10_000,
            **settings,
        },
    )


def examples_of(rows: TokenRows, count: int) -> list[dict]:
    """Return rows as Trainer takes them: lists in dictionaries."""
    starts = rows.starts[: count + 1].tolist()
    return [{"input_ids": rows.tokens[a:b].tolist()} for a, b in itertools.pairwise(starts)]


def run(*arguments: str) -> float:
    """Measure the seconds that a Python process takes from start to end."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, env=environment
    )
    return time.perf_counter() - start


def main() -> None:
    """Run all comparisons, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.bench",
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
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="arithmetic of both (fp32)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per step (8)")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="training steps per measurement (4)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="pairs of measurements (5)"
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help="also prepare 1, 4 and 16 times the text (a minute more)",
    )
    parser.add_argument(
        "--output", default="bench.json", metavar="FILE", help="results as JSON (bench.json)"
    )
    arguments = parser.parse_args()
    for name in ("model", "text"):  # child processes start in another directory
        if os.path.exists(path := getattr(arguments, name)):
            setattr(arguments, name, os.path.abspath(path))

    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    if arguments.device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    print(machine)
    print(f"{'compared with':28} {'ours':>12} {'theirs':>12} {'ratio':>8}   lowest to highest")
    results: dict[str, Any] = {}
    for name, result in compare(arguments):
        results[name] = result
        print(
            f"{name:28} {result['ours']:12.6g} {result['theirs']:12.6g} "
            f"{result['ratio']:7.2f}x   {result['lowest']:.2f} to {result['highest']:.2f}",
            flush=True,
        )
        if "roofline_share" in result:
            share, rate = result["roofline_share"], result["matrix_flops_per_second"]
            print(
                f"{'':28} {share:.0%} of the {rate:.3g} FLOP/s of a matrix product alone, "
                f"{result['tokens_per_second']:,.0f} tokens/s"
                + (f", MFU {result['mfu']:.1%}" if result["mfu"] else "")
            )
    print(f"train.py --help: {run('train.py', '--help'):.2f} s")
    results["growth"] = []
    if arguments.growth:
        config = tutorial_shape(arguments.model, arguments.text, arguments.text_column)
        for line in growth(list(load_documents(config)[0]), arguments.model):
            results["growth"].append(line)
            print(
                f"{line['factor']:2} x the text: prepared in {line['seconds']:.1f} s, peak "
                f"memory {line['own_memory'] / 2**20:,.0f} MiB, with mapped files "
                f"{line['peak_memory'] / 2**20:,.0f}; from the cache in "
                f"{line['again']:.1f} s",
                flush=True,
            )
    content = {"machine": machine, "results": results}
    Path(arguments.output).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

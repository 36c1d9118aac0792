"""Check tests, speed, kernels, runs and losses on one GPU, unattended, in calls of 9 minutes.

    python -m tests.tools.gpu_check --output gpu_check.json     # and again: it goes on

1. the tests marked `cuda`;
2. the tutorial's step (distilroberta-base's shape, blocks of 128) beside Hugging Face Trainer in
   the same precision, A B A B ...: 8 to 1,024 rows; bf16, fp16 and fp32 (TF32); plain and compiled.
   A compiled step is compared with the plain Trainer;
3. profiles of a step, plain and compiled: kernels, the time that the GPU is busy, and the gaps;
4. train.py from its command line to its end, in two precisions; killed and resumed; on a GPU also
   without enough memory; and steps under NCCL, with one rank;
5. each part of speed/ switched off, in turn with it on;
6. 200 steps from random weights in bf16 and fp16 beside fp32.

Everything is one entry of a JSON file, which is written anew after each entry. One that raises, or
that there is no time left for, says so, and the others still run. A second call with the same file
measures what the first had no time for. Weights and ids are random: no Hub is needed. Trainer has
its rows in memory, as lists; the tutorial's lie on disk, which is slower. `datasets` has to be
installed, because train.py reads its text through it.

`--tiny` does all of it on a CPU in a minute, to see that this program works.
"""

import argparse
import copy
import gc
import hashlib
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import distributed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainerCallback,
)

from mlm_scratch import model
from mlm_scratch.config import TrainConfig
from mlm_scratch.data import corpus
from mlm_scratch.hf.small_modernbert import train_tokenizer
from mlm_scratch.loop import Done, compute_step, run_steps
from mlm_scratch.model import MaskedLM
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import DTYPES, Precision
from mlm_scratch.report.metrics import METRICS, read_metrics
from mlm_scratch.run import build
from mlm_scratch.run.build import layouts, prepare
from mlm_scratch.run.saver import Saver
from mlm_scratch.run.session import train
from mlm_scratch.run.state import Training
from mlm_scratch.speed import model as fast_model
from mlm_scratch.speed.flops import StepFlops, peak_rate
from mlm_scratch.speed.padded_vocabulary import PaddedVocabulary
from mlm_scratch.util import errors as cli
from mlm_scratch.util.errors import UserError
from tests.support.tiny import NO_DROPOUT, write_text
from tests.tools.bench import ROOT, run_trainer, summary, tutorial_shape

# For one H100, in bf16: (rows of 128, value, at least this, in words).
AIMS = (
    (8, "ratio", 3.0, "3 x Trainer"),
    (8, "tokens_per_second", 400e3, "400 k tokens/s"),
    (256, "tokens_per_second", 1.33e6, "1.33 M tokens/s"),  # 40 % of 989 TFLOP/s
    (1024, "tokens_per_second", 1.33e6, "1.33 M tokens/s"),
)
PRECISIONS = ("bf16", "fp16", "fp32")
TESTS_LIMIT = 180  # seconds
MEANS = 10  # of the losses of a run

Group = tuple[tuple[int, ...], tuple[str, ...], bool]  # sizes, precisions, compiled
Switch = Callable[[], AbstractContextManager]  # does without something


def roberta_config(vocab: int, hidden: int, layers: int, heads: int, length: int) -> RobertaConfig:
    """Return the shape of a RoBERTa for inputs of up to `length` tokens."""
    return RobertaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=length + 2,
        type_vocab_size=1,
    )


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    model: RobertaConfig = field(default_factory=lambda: roberta_config(50265, 768, 6, 12, 512))
    block: int = 128  # tokens per row
    text: int = 8192  # rows of random ids
    # rows -> (steps of warm-up, steps timed); a CUDA graph is captured in the fourth
    steps: dict[int, tuple[int, int]] = field(
        default_factory=lambda: {8: (10, 60), 64: (8, 40), 256: (5, 20), 1024: (5, 8)}
    )
    pairs: int = 3  # of ours and Trainer's
    # What to measure, in this order: (rows, precisions, compiled).
    groups: tuple[Group, ...] = (
        ((8, 256), ("bf16",), False),
        ((8, 256), ("bf16",), True),
        ((8, 256), ("fp16", "fp32"), False),
        ((1024, 64), PRECISIONS, False),
        ((8, 256), ("fp16", "fp32"), True),
        ((1024, 64), PRECISIONS, True),
    )
    repeats: int = 26  # of each fact in the text to learn
    vocabulary: int = 4096  # of its tokenizer
    learning: tuple[int, int, float] = (32, 200, 1e-4)  # rows, steps, learning rate
    run: tuple[int, int] = (256, 60)  # rows, steps of train.py
    switched: int = 256  # rows of a step with parts of speed/ on and off
    needs: int = 15  # seconds that must be left to begin an entry; four times that to compile


TINY = Scale(
    model=roberta_config(300, 32, 1, 2, 64),  # a second layer takes longer to compile
    block=16,
    text=64,
    steps={2: (1, 2), 4: (1, 2)},
    pairs=1,
    groups=(((2, 4), ("bf16",), False), ((2,), ("bf16",), True), ((2,), ("fp16", "fp32"), False)),
    run=(4, 12),
    switched=4,
    repeats=1,
    vocabulary=300,
    learning=(4, 20, 1e-3),
    needs=0,
)


class Part(NamedTuple):
    """A part of speed/: how to do without it, and the steps in which it matters."""

    without: Switch
    settings: Mapping[str, Any] = {}
    few_rows: bool = False


# ---- Entries -------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A measurement and what came of it."""

    name: str
    step: dict[str, Any] = field(default_factory=dict)  # rows, precision, compiled
    values: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # the reason of each None in values
    failure: str = ""  # why some values, or all, are not there at all
    seconds: float = 0.0


# (entry, what fills it, seconds that must be left)
Task = tuple[Entry, Callable[[Entry], None], float]


def run_tasks(
    tasks: Iterable[Task], deadline: float, known: dict[str, Entry] | None = None
) -> Iterator[Entry]:
    """Fill one entry after the other, but those that are known; an error in one is its result."""
    for entry, work, needs in tasks:
        if known and entry.name in known:
            yield known[entry.name]
            continue
        begin = time.monotonic()
        if deadline - begin <= needs:
            entry.failure = "not reached: out of time"
        else:
            try:
                with interrupted_after(deadline - begin), redirect_stdout(io.StringIO()):
                    work(entry)
            except Exception as error:
                entry.failure = first_line(error)
        for name in (name for name, value in entry.values.items() if value is None):
            reason = "no data sheet of this device" if "mfu" in name else "only a GPU shows it"
            entry.missing.setdefault(name, reason)
        entry.seconds = time.monotonic() - begin
        yield entry


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what runs too long, such as torch.compile."""

    def interrupt(*_: object) -> None:
        raise TimeoutError("out of time")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again and again: a library may catch it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, or two after a colon."""
    message = re.sub(r":\s*\n", ": ", str(error).strip())
    return ": ".join([type(error).__name__, *message.splitlines()[:1]])


# ---- Measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """One repetition."""

    seconds: float  # per step
    gigabytes: float  # peak on a GPU
    positions: float  # on which the head ran, per step
    flop: float  # that a step cannot do without


class Stopwatch(TrainerCallback):
    """Times the steps after the warm-up, from an idle GPU to an idle GPU."""

    def __init__(self, warm_up: int, steps: int):
        self.warm_up, self.steps, self.done = warm_up, steps, 0
        self.begin = self.end = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a step, of Trainer or of ours."""
        self.done += 1
        if self.done == self.warm_up:
            self.begin = time_when_idle()
        elif self.done == self.warm_up + self.steps:
            self.end = time_when_idle()

    def timed(self, model: MaskedLM, tokens: int, block: int, positions: float) -> Timed:
        """Return what was measured of a step of `tokens`, whose head saw some positions."""
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        flop = StepFlops(model).count(tokens, block, round(positions))
        return Timed((self.end - self.begin) / self.steps, peak / 1e9, positions, flop)


def time_when_idle() -> float:
    """Return the time at which the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def fresh(precision: str) -> Iterator[None]:
    """Begin with the GPU's memory free; multiply fp32 in TF32, in ours and in Trainer.

    TrainingArguments(tf32=True) does that through another API of torch's, which refuses a mix of
    both.
    """
    torch.compiler.reset()  # frees recorded CUDA graphs
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.set_float32_matmul_precision("high" if precision == "fp32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


class Check:
    """All measurements on one device."""

    def __init__(self, scale: Scale, device: torch.device, directory: Path):
        self.scale, self.device, self.directory = scale, device, directory
        self.trainer: dict[tuple[int, str], list[Timed]] = {}  # by rows and precision
        self.refusals: dict[tuple[int, str], str] = {}  # what Trainer raised there

    def tasks(self) -> Iterator[Task]:
        """Yield all there is to do, the most important first."""
        plain, compiled, *others = self.scale.groups
        needs = self.scale.needs
        yield Entry("tests marked cuda"), run_tests, 0
        for group in (plain, compiled):
            yield from self.step_tasks(*group)
        yield Entry("profile of a step"), partial(self.profile, plain, 0), needs
        yield Entry("profile of a large step, compiled"), partial(self.profile, compiled, -1), needs
        for precision in ("auto", "fp16"):
            yield Entry(f"train.py, {precision}"), partial(self.train, precision), 2 * needs
        yield Entry("train.py, killed and resumed"), self.kill_and_resume, 3 * needs
        yield Entry("train.py, out of memory"), self.run_out_of_memory, 2 * needs
        yield Entry("all-reduce with one rank"), self.all_reduce, needs
        for name, part in PARTS.items():
            yield Entry(f"without {name}"), partial(self.switch_off, part), 2 * needs
        yield Entry("without background writer"), self.write_in_the_foreground, 3 * needs
        yield Entry("losses from random weights"), self.compare_losses, 2 * needs
        for group in others:
            yield from self.step_tasks(*group)

    def step_tasks(
        self, sizes: tuple[int, ...], precisions: tuple[str, ...], compiled: bool
    ) -> Iterator[Task]:
        """Yield the comparisons of a step with Trainer's."""
        for precision, rows in product(precisions, sizes):
            step = {"rows": rows, "precision": precision, "compiled": compiled}
            name = f"{rows} x {self.scale.block}, {precision}" + ", compiled" * compiled
            needs = self.scale.needs * (4 if compiled else 1)
            yield Entry(name, step), self.compare_steps, needs

    def compare_steps(self, entry: Entry) -> None:
        """Alternate our steps and Trainer's. To compile takes long: only once."""
        rows, precision, compiled = entry.step.values()
        ours: list[Timed] = []
        theirs = self.trainer.setdefault((rows, precision), [])
        measured_before = bool(theirs)
        try:
            for _ in range(1 if compiled else self.scale.pairs):
                ours.append(self.our_steps(rows, precision, compiled))
                if not measured_before and (rows, precision) not in self.refusals:
                    self.add_trainer(rows, precision)
        finally:
            if ours:
                self.fill(entry, ours, theirs)

    def our_steps(self, rows: int, precision: str, compiled: bool = False, **others: Any) -> Timed:
        """Measure our steps, with the loading, masking and copying of their data."""
        directory = self.lines if others.get("grouping") == "lines" else self.random_ids
        with fresh(precision):
            t = prepare(self.config(directory, rows, precision, compile=compiled, **others))
            steps = t.loader.steps(0, sum(self.scale.steps[rows]))
            return self.time_steps(t, run_steps(steps, **t.step_arguments()), rows)

    def time_steps(self, t: Training, steps: Iterable[Done], rows: int) -> Timed:
        """Run and measure these steps."""
        watch, positions = Stopwatch(*self.scale.steps[rows]), 0
        for done in steps:
            watch.on_step_end()
            positions += sum(len(batch.positions) for batch in done.step.batches)
        return watch.timed(
            t.model, rows * self.scale.block, self.scale.block, positions / watch.done
        )

    def add_trainer(self, rows: int, precision: str) -> None:
        """Measure Trainer's steps. What it raises is kept: ours are still worth having."""
        warm_up, steps = self.scale.steps[rows]
        watch = Stopwatch(warm_up, steps)
        try:
            with fresh(precision):
                run_trainer(self.config(self.random_ids, rows, precision), warm_up + steps, watch)
                tokens, block = rows * self.scale.block, self.scale.block
                timed = watch.timed(MaskedLM(self.shape), tokens, block, positions=tokens)
                self.trainer[rows, precision].append(timed)
        except TimeoutError:
            raise
        except Exception as error:
            self.refusals[rows, precision] = first_line(error)

    def fill(self, entry: Entry, ours: list[Timed], theirs: list[Timed]) -> None:
        """Enter the medians of both, and of the ratios of their pairs."""
        rows, precision, compiled = entry.step.values()
        entry.values = self.figures(ours, rows, precision)
        trainer: dict[str, float | None] = dict.fromkeys(entry.values)
        ratios: dict[str, float | None] = dict.fromkeys(("ratio", "lowest", "highest"))
        if theirs:
            trainer = self.figures(theirs, rows, precision)
            together = product(ours, theirs) if compiled else zip(ours, theirs, strict=False)
            pairs = summary([(a.seconds, b.seconds) for a, b in together])
            ratios = {name: pairs[name] for name in ratios}
        others = {f"trainer_{name}": value for name, value in trainer.items()} | ratios
        if not theirs:
            reason = self.refusals.get((rows, precision), "Trainer was not measured")
            entry.missing = dict.fromkeys(others, reason)
        entry.values |= others

    def figures(self, timed: list[Timed], rows: int, precision: str) -> dict[str, float | None]:
        """Return the medians of some repetitions, and what follows from them."""
        seconds = statistics.median(one.seconds for one in timed)
        positions = statistics.median(one.positions for one in timed)
        tokens = rows * self.scale.block
        # Only what is executed counts: the head runs on `positions`, not always on all tokens.
        rate = statistics.median(one.flop for one in timed) / seconds
        peak = peak_rate(Precision(self.device, DTYPES[precision]))
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "head_positions": positions,
            "mfu": rate / peak if peak else None,
            "peak_gigabytes": max(one.gigabytes for one in timed) or None,
        }

    def profile(self, group: Group, which: int, entry: Entry) -> None:
        """Profile one step of a group; its time is that of steps that are not profiled."""
        sizes, (precision, *_), compiled = group
        rows = sizes[which]
        count = sum(self.scale.steps[rows])
        with fresh(precision):
            t = prepare(self.config(self.random_ids, rows, precision, compile=compiled))
            steps = run_steps(t.loader.steps(0, count + 1), **t.step_arguments())
            seconds = self.time_steps(t, islice(steps, count), rows).seconds
            on_gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
                next(steps)
                time_when_idle()
        entry.values = {"seconds": seconds} | kernel_figures(profiler.events() or [], seconds)

    # ---- Runs from the command line

    def command(self, name: str, *flags: Any, precision: str = "auto") -> list[str]:
        """Return the command of a run into a directory `name`."""
        rows, steps = self.scale.run
        directory = self.random_ids
        settings = [
            *("--model", directory, "--init", "scratch", "--train-file", directory / "text.txt"),
            *("--block-size", self.scale.block, "--batch-size", rows, "--max-steps", steps),
            *("--device", self.device, "--precision", precision, "--log-every", 1),
            *("--eval-fraction", 0.05, "--save-every", steps // 6, "--keep", 10),
            *("--output-dir", self.directory / name),
        ]
        return [sys.executable, str(ROOT / "train.py"), *map(str, [*settings, *flags])]

    def train(self, precision: str, entry: Entry) -> None:
        """Train from the command line to the end."""
        name = f"whole-{precision}"
        result = run_command(self.command(name, precision=precision))
        run = self.directory / name
        entry.values = {"exit_code": result.returncode, "output": tail(result)}
        lines = read_metrics(run)
        losses = [line["loss"] for line in lines if "loss" in line]
        results = json.loads((run / "results.json").read_text())
        figures = {name: results[name] for name in ("steps", "seconds", "tokens_per_second")}
        entry.values |= figures | {"first_loss": losses[0], "last_loss": losses[-1]}

    def kill_and_resume(self, entry: Entry) -> None:
        """Kill a run as it goes on after a checkpoint, resume it, and compare with a whole one."""
        whole = self.directory / "whole-auto"
        if not whole.exists():  # measured by a call before this one
            self.train("auto", Entry(""))
        run, half = self.directory / "killed", self.scale.run[1] // 6 * 3
        process = subprocess.Popen(self.command("killed"), stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None and not (run / f"checkpoint-{half}").exists():
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        lines = read_metrics(run)
        resumed = run_command(
            [sys.executable, str(ROOT / "train.py"), "--resume", "--output-dir", str(run)]
        )
        one, other = ([line.get("loss", 0.0) for line in read_metrics(d)] for d in (whole, run))
        entry.values = {
            "killed_at": lines[-1]["step"],
            "exit_code": resumed.returncode,
            "output": tail(resumed),
            "same_metrics": int((whole / METRICS).read_text() == (run / METRICS).read_text()),
            "largest_difference": max(abs(a - b) for a, b in zip(one, other, strict=True)),
        }

    def run_out_of_memory(self, entry: Entry) -> None:
        """Let train.py want more memory than a GPU has: exit code 2, and what to do."""
        entry.values = dict.fromkeys(("exit_code", "advice"))
        if self.device.type == "cuda":
            result = run_command(self.command("large", "--batch-size", self.scale.text))
            advice = next((line for line in tail(result) if "out of memory" in line), None)
            entry.values = {"exit_code": result.returncode, "advice": advice}

    def all_reduce(self, entry: Entry) -> None:
        """Take the same steps with gradients all-reduced by NCCL (on a CPU gloo), and without."""
        rows, _ = self.scale.run
        losses = []
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            for ranks in (ALONE, Ranks(size=2)):  # who is one of two wraps the model
                with fresh("fp32"):
                    t = prepare(self.config(self.facts, rows, "fp32", no_graph=True))
                    t.ddp_model = ranks.wrap(t.model, t.precision.device)
                    done = run_steps(t.loader.steps(0, 5), **t.step_arguments())
                    losses.append([step.loss.item() for step in done])
        finally:
            distributed.destroy_process_group()
        entry.values = {
            "last_loss": losses[0][-1],
            "largest_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        }

    # ---- Parts of speed/, on and off

    def switch_off(self, part: Part, entry: Entry) -> None:
        """Alternate steps without a part and with it."""
        rows, pairs = min(self.scale.steps) if part.few_rows else self.scale.switched, []
        precision = self.scale.groups[0][1][0]
        for _ in range(self.scale.pairs):
            with_it = self.our_steps(rows, precision, **part.settings)
            with part.without():
                pairs.append((with_it, self.our_steps(rows, precision, **part.settings)))
        entry.values = gain(pairs) | {
            "gigabytes": pairs[0][0].gigabytes or None,
            "gigabytes_without": pairs[0][1].gigabytes or None,
        }

    def write_in_the_foreground(self, entry: Entry) -> None:
        """Alternate runs that save while they go on, as on every GPU, and runs that wait."""
        rows, steps = self.scale.run
        settings = {"max_steps": steps, "save_every": steps // 6, "init": "scratch"}
        pairs: list[tuple[Timed, Timed]] = []
        for number in range(self.scale.pairs):
            timed = []
            for in_background in (True, False):
                name = str(self.directory / f"writer-{number}-{in_background}")
                config = self.config(self.random_ids, rows, "fp32", output_dir=name, **settings)
                saver = Saver(in_background)
                with (
                    fresh("fp32"),
                    patch.object(build, "Saver", lambda *_, saver=saver, **__: saver),
                ):
                    run = train(config)
                seconds = json.loads((run / "results.json").read_text())["seconds"]
                timed.append(Timed(seconds, 0.0, 0.0, 0.0))
            pairs.append((timed[0], timed[1]))
        entry.values = gain(pairs)

    # ---- Losses

    def compare_losses(self, entry: Entry) -> None:
        """Train from the same random weights, on the same data and masks, in each precision."""
        exact: list[float] = []
        for precision in ("fp32", "bf16", "fp16"):
            losses, skipped = self.learn(precision)
            part = len(losses) // MEANS
            means = [statistics.fmean(losses[i : i + part]) for i in range(0, len(losses), part)]
            entry.values |= {
                f"{precision}_means_of_{part}": means,
                f"{precision}_skipped_steps": skipped,
            }
            exact = exact or means
            if means is not exact:
                difference = max(abs(a - b) for a, b in zip(exact, means, strict=True))
                entry.values[f"{precision}_largest_difference"] = difference

    def learn(self, precision: str) -> tuple[list[float], int]:
        """Return the losses of a run from random weights, and the number of skipped steps."""
        rows, steps, lr = self.scale.learning
        settings = {"max_steps": steps, "lr": lr, "warmup_steps": steps // 10}
        with fresh(precision):
            t = prepare(self.config(self.facts, rows, precision, **settings))
            done = run_steps(t.loader.steps(0, steps), **t.step_arguments())
            losses = [step.loss for step in done]
            # The schedule does not count steps that were skipped.
            return torch.stack(losses).tolist(), steps - t.scheduler.last_epoch

    # ---- Models and texts

    def config(self, directory: Path, rows: int, precision: str, **settings: Any) -> TrainConfig:
        """Return the tutorial's settings for a directory with a model and a text."""
        return tutorial_shape(
            str(directory),
            str(directory / "text.txt"),
            "text",
            device=str(self.device),
            block_size=self.scale.block,
            batch_size=rows,
            precision=precision,
            **settings,
        )

    @cached_property
    def shape(self) -> RobertaForMaskedLM:
        """The shape of the model, without weights."""
        with torch.device("meta"):
            return RobertaForMaskedLM(self.scale.model)

    @cached_property
    def random_ids(self) -> Path:
        """The model, and a text of random numbers, which are their own ids."""
        vocab, shape = self.scale.model.vocab_size, (self.scale.text, self.scale.block)
        ids = torch.randint(4, vocab - 1, shape, generator=torch.Generator().manual_seed(0))
        texts = [" ".join(map(str, row)) for row in ids.tolist()]
        return save(self.directory / "random", self.scale.model, number_tokenizer(vocab), texts)

    @cached_property
    def lines(self) -> Path:
        """The model, and random documents of 4 tokens up to a whole row."""
        vocab, block = self.scale.model.vocab_size, self.scale.block
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(4, block - 1, (self.scale.text,), generator=generator).tolist()
        texts = [
            " ".join(map(str, torch.randint(4, vocab - 1, (n,), generator=generator).tolist()))
            for n in lengths
        ]
        return save(self.directory / "lines", self.scale.model, number_tokenizer(vocab), texts)

    @cached_property
    def facts(self) -> Path:
        """A model without dropout, so that only the precision differs, and a text to learn."""
        model = copy.deepcopy(self.scale.model)
        model.update(NO_DROPOUT)
        rows = corpus.rows(repeats=self.scale.repeats)
        texts = [" ".join(row["answers"]["text"]) for row in rows]
        tokenizer = train_tokenizer(texts, self.scale.vocabulary)
        return save(self.directory / "facts", model, tokenizer, texts)


PARTS = {
    "CUDA graph": Part(lambda: patch.object(build, "StepGraph", lambda: compute_step), {}, True),
    "gathering after the last attention": Part(
        lambda: patch.object(build, "earliest_gather", lambda model, _: model.hf_model.base_model)
    ),
    "padded vocabulary": Part(
        lambda: patch.object(
            build, "pad_vocabulary", lambda m: PaddedVocabulary(m.hf_model.config.vocab_size)
        )
    ),
    "chunked loss": Part(
        lambda: patch.object(fast_model, "cross_entropy_sum", model.cross_entropy_sum)
    ),
    "packing": Part(
        lambda: patch.object(build, "first_position_if_packed", lambda model, length: None),
        {"grouping": "lines"},
    ),
    "aligned rows": Part(
        lambda: patch.object(
            build, "layouts", lambda config, model, _, alike: layouts(config, model, False, alike)
        ),
        {"grouping": "lines", "no_packing": True},
    ),
    "ready attention mask": Part(
        lambda: patch.object(build, "ready_mask_works", lambda model, length: False),
        {"grouping": "lines", "no_packing": True},
    ),
}


def gain(pairs: list[tuple[Timed, Timed]]) -> dict[str, Any]:
    """Return how much longer steps take without a part than with it."""
    timed = summary([(one.seconds, other.seconds) for one, other in pairs])
    return {"seconds": timed["ours"]} | {
        name: timed[name] for name in ("ratio", "lowest", "highest")
    }


def run_command(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of this project without the Hub."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=offline, cwd=ROOT)


def tail(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the last lines of its errors and of its output."""
    return [*result.stderr.splitlines()[-5:], *result.stdout.splitlines()[-15:]]


def run_tests(entry: Entry) -> None:
    """Run the tests marked `cuda`, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_LIMIT)
    lines = (result.stderr + result.stdout).splitlines()
    for kind in ("passed", "failed", "error", "skipped", "xfailed"):
        entry.values[kind] = sum(map(int, re.findall(rf"(\d+) {kind}", lines[-1])))
    entry.values |= {"exit_code": result.returncode, "output": lines[-40:]}


def save(
    directory: Path, model: RobertaConfig, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> Path:
    """Save a model without weights, its tokenizer, and a text."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_text(directory / "text.txt", texts)
    return directory


def number_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose words are the numbers of their ids, with RoBERTa's special tokens."""
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": size - 1}
    words = {str(number): number for number in range(4, size - 1)}
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )


def kernel_figures(events: Iterable[Any], seconds: float) -> dict[str, Any]:
    """Summarize what the GPU did in a profiled step that takes `seconds` when not profiled."""
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)  # in microseconds
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spans[event.name].append((event.time_range.start, event.time_range.end))
    if not spans:
        return dict.fromkeys(("launches", "copies", "busy_seconds", "gap_seconds", "kernels"))
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(span for some in spans.values() for span in some):
        busy += max(0.0, end - max(start, reached))  # they may overlap
        reached = max(reached, end)
    kernels: list[dict[str, Any]] = [
        {"name": name, "calls": len(some), "seconds": sum(end - start for start, end in some) / 1e6}
        for name, some in spans.items()
        if not name.startswith(("Memcpy", "Memset"))
    ]
    launches = sum(kernel["calls"] for kernel in kernels)
    return {
        "launches": launches,
        "copies": sum(map(len, spans.values())) - launches,
        "busy_seconds": busy / 1e6,
        "gap_seconds": seconds - busy / 1e6,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["seconds"])[:10],
    }


# ---- The report ----------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """Return what CUDA calls the GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def environment(device: torch.device) -> dict[str, str | None]:
    """Return what the figures depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # not installed
        driver = None
    return {
        "device": device_name(device),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
        "source": source_digest(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def source_digest() -> str:
    """Digest the package and what measures it: figures of other versions do not go with these."""
    digest = hashlib.sha256()
    folders = (ROOT / "mlm_scratch", ROOT / "tests" / "tools", ROOT / "tests" / "support")
    for path in sorted([ROOT / "train.py", *chain(*(f.rglob("*.py") for f in folders))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_report(path: Path, facts: dict[str, str | None]) -> dict[str, Entry]:
    """Return the entries of a call before this one that need not be measured again, by name.

    Raises:
        UserError: they are of another device or version.
    """
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    for name, value in facts.items():
        if name != "date" and (of_file := report["environment"].get(name)) != value:
            raise UserError(f"{path} is of {name} {of_file}, not {value}: give another --output")
    entries = [Entry(**entry) for entry in report["entries"]]
    return {entry.name: entry for entry in entries if "out of time" not in entry.failure}


def verdicts(entries: list[Entry]) -> list[str]:
    """Judge the aims by the better of the plain and the compiled step."""
    lines = []
    for rows, value, least, words in AIMS:
        found = [
            (entry.values[value], entry.name)
            for entry in entries
            if (entry.step.get("rows"), entry.step.get("precision")) == (rows, "bf16")
            and entry.values.get(value) is not None
        ]
        verdict = "not measured"
        if found:
            best, name = max(found)
            figure = f"{best:.2f} x" if value == "ratio" else f"{best:,.0f} tokens/s"
            verdict = f"{'reached' if best >= least else 'not reached'}, {figure} ({name})"
        lines.append(f"- {words} with {rows} rows: {verdict}")
    return lines


def table(entries: list[Entry]) -> list[str]:
    """Return the steps as a Markdown table."""
    columns = {
        "tokens/s": ("{:,.0f}", "tokens_per_second"),
        "Trainer": ("{:,.0f}", "trainer_tokens_per_second"),
        "ratio (lowest to highest)": ("{:.2f} x ({:.2f} to {:.2f})", "ratio", "lowest", "highest"),
        "MFU": ("{:.1%}", "mfu"),
        "Trainer's": ("{:.1%}", "trainer_mfu"),
        "peak, GB": ("{:.2f}", "peak_gigabytes"),
        "Trainer's peak": ("{:.2f}", "trainer_peak_gigabytes"),
    }
    lines = [f"| | {' | '.join(columns)} | |", "|---" * (len(columns) + 2) + "|"]
    for entry in entries:
        if entry.step:
            cells = [entry.name]
            for form, *names in columns.values():
                values = [entry.values.get(name) for name in names]
                cells.append("" if None in values else form.format(*values))
            cells.append(entry.failure or entry.missing.get("ratio", ""))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def other_lines(entries: list[Entry]) -> Iterator[str]:
    """Yield a line for each entry that is not in the table."""
    for entry in entries:
        if not entry.step:
            numbers = {k: v for k, v in entry.values.items() if isinstance(v, int | float)}
            cells = [f"{name} {value:.4g}" for name, value in numbers.items()]
            yield f"- {entry.name}: {'; '.join(filter(None, [*cells, entry.failure]))}"


def main() -> None:
    """Measure, write JSON after each entry, print a report."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda; with --tiny cpu")
    parser.add_argument("--output", default="gpu_check.json", metavar="FILE", help="of the results")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="at most (9)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few steps")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cpu" if arguments.tiny else "cuda"))
    if device.type == "cuda":  # Trainer would use all GPUs that it sees
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    facts, output = environment(device), Path(arguments.output)
    facts["scale"] = "tiny" if arguments.tiny else "full"
    known = read_report(output, facts)
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory() as directory:
        check = Check(TINY if arguments.tiny else Scale(), device, Path(directory))
        for entry in run_tasks(check.tasks(), begin + 60 * arguments.minutes, known):
            entries.append(entry)
            print(f"{entry.seconds:6.1f} s  {entry.name}  {entry.failure}", file=sys.stderr)
            report = {
                "environment": facts,
                "aims": verdicts(entries),
                "entries": [asdict(entry) for entry in entries],
            }
            output.write_text(json.dumps(report, indent=1))
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value), "", sep="\n")
    print(*table(entries), "", *other_lines(entries), "", sep="\n")
    print("Aims for one H100, in bf16:", "", *verdicts(entries), sep="\n")


if __name__ == "__main__":
    sys.exit(cli.run_command(main))

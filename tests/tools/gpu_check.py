"""Check tests, speed, kernels and losses on one GPU, unattended, in at most 9 minutes.

    python -m tests.tools.gpu_check --output gpu_check.json

1. the tests marked `cuda`;
2. the tutorial's step (distilroberta-base's shape, blocks of 128) beside Hugging Face Trainer in
   the same precision, A B A B ...: 8 to 1,024 rows; bf16, fp16 and fp32 (TF32); plain and compiled.
   A compiled step is compared with the plain Trainer;
3. a profile of one step: kernels, the time that the GPU is busy, and the gaps;
4. 200 steps from random weights in bf16 and fp16 beside fp32.

Everything is one entry of a JSON file, which is written anew after each entry. One that raises, or
that there is no time left for, says so, and the others still run. Weights and ids are random: no
Hub is needed. Trainer has its rows in memory, as lists; the tutorial's lie on disk, which is
slower. `datasets` has to be installed, because train.py reads its text through it.

`--tiny` does all of it on a CPU in half a minute, to see that this program works.
"""

import argparse
import copy
import gc
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainerCallback,
)

from mlm_scratch.config import TrainConfig
from mlm_scratch.data import corpus
from mlm_scratch.hf.small_modernbert import train_tokenizer
from mlm_scratch.loader import Step
from mlm_scratch.loop import run_steps, train_step
from mlm_scratch.model import MaskedLM
from mlm_scratch.precision import DTYPES, Precision
from mlm_scratch.run.build import prepare
from mlm_scratch.run.state import Training
from mlm_scratch.speed.flops import StepFlops, peak_rate
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
    # rows -> (steps of warm-up, steps timed); compiled, a CUDA graph is recorded in the third
    steps: dict[int, tuple[int, int]] = field(
        default_factory=lambda: {8: (10, 60), 64: (8, 40), 256: (5, 20), 1024: (4, 8)}
    )
    pairs: int = 3  # of ours and Trainer's
    # What to measure, in this order: (rows, precisions, compiled).
    groups: tuple[tuple[tuple[int, ...], tuple[str, ...], bool], ...] = (
        ((8, 256), ("bf16",), False),
        ((8, 256), ("fp16", "fp32"), False),
        ((8, 256), ("bf16",), True),
        ((1024, 64), PRECISIONS, False),
        ((8, 256), ("fp16", "fp32"), True),
        ((1024, 64), PRECISIONS, True),
    )
    repeats: int = 26  # of each fact in the text to learn
    vocabulary: int = 4096  # of its tokenizer
    learning: tuple[int, int, float] = (32, 200, 1e-4)  # rows, steps, learning rate
    needs: int = 15  # seconds that must be left to begin an entry; four times that to compile


TINY = Scale(
    model=roberta_config(300, 32, 1, 2, 64),  # a second layer takes longer to compile
    block=16,
    text=64,
    steps={2: (1, 2), 4: (1, 2)},
    pairs=2,
    groups=(((2, 4), PRECISIONS, False), ((2,), ("bf16",), True)),
    repeats=1,
    vocabulary=300,
    learning=(4, 20, 1e-3),
    needs=0,
)


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


def run_tasks(tasks: Iterable[Task], deadline: float) -> Iterator[Entry]:
    """Fill one entry after the other; an error in one of them is its result."""
    for entry, work, needs in tasks:
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
        first, *others = self.scale.groups
        yield Entry("tests marked cuda"), run_tests, 0
        yield from self.step_tasks(*first)
        yield Entry("profile of a step"), self.profile, self.scale.needs
        yield Entry("losses from random weights"), self.compare_losses, 2 * self.scale.needs
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

    def our_steps(self, rows: int, precision: str, compiled: bool) -> Timed:
        """Measure our steps, with the loading, masking and copying of their data."""
        with fresh(precision):
            t = prepare(self.config(self.random_ids, rows, precision, compile=compiled))
            return self.time_steps(t, t.loader.steps(0, sum(self.scale.steps[rows])), rows)

    def time_steps(self, t: Training, steps: Iterator[Step], rows: int) -> Timed:
        """Run and measure these steps."""
        watch, positions = Stopwatch(*self.scale.steps[rows]), 0
        for step in steps:
            train_step(step=step, **t.step_arguments())
            watch.on_step_end()
            positions += sum(len(batch.positions) for batch in step.batches)
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

    def profile(self, entry: Entry) -> None:
        """Profile one step of the first shape; its time is that of steps that are not profiled."""
        (rows, *_), (precision, *_), _ = self.scale.groups[0]
        count = sum(self.scale.steps[rows])
        with fresh(precision):
            t = prepare(self.config(self.random_ids, rows, precision))
            steps = t.loader.steps(0, count + 1)
            seconds = self.time_steps(t, islice(steps, count), rows).seconds
            on_gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
                train_step(step=next(steps), **t.step_arguments())
                time_when_idle()
        entry.values = {"seconds": seconds} | kernel_figures(profiler.events() or [], seconds)

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
    def facts(self) -> Path:
        """A model without dropout, so that only the precision differs, and a text to learn."""
        model = copy.deepcopy(self.scale.model)
        model.update(NO_DROPOUT)
        rows = corpus.rows(repeats=self.scale.repeats)
        texts = [" ".join(row["answers"]["text"]) for row in rows]
        tokenizer = train_tokenizer(texts, self.scale.vocabulary)
        return save(self.directory / "facts", model, tokenizer, texts)


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
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
    facts = environment(device)
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory() as directory:
        check = Check(TINY if arguments.tiny else Scale(), device, Path(directory))
        for entry in run_tasks(check.tasks(), begin + 60 * arguments.minutes):
            entries.append(entry)
            print(f"{entry.seconds:6.1f} s  {entry.name}  {entry.failure}", file=sys.stderr)
            report = {
                "environment": facts,
                "aims": verdicts(entries),
                "entries": [asdict(entry) for entry in entries],
            }
            Path(arguments.output).write_text(json.dumps(report, indent=1))
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value), "", sep="\n")
    print(*table(entries), "", *other_lines(entries), "", sep="\n")
    print("Aims for one H100, in bf16:", "", *verdicts(entries), sep="\n")


if __name__ == "__main__":
    main()

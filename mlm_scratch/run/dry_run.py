"""A run up to its first steps, shown and not begun: what train.py --dry-run prints.

All of it comes from what the run itself would use, so its numbers are those of the run to come.
"""

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import accumulate, chain, islice, takewhile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mlm_scratch import loop
from mlm_scratch.config import RECIPES, TrainConfig, changed
from mlm_scratch.data.documents import Documents
from mlm_scratch.data.rows import PreparedRows, tokenize
from mlm_scratch.hf.encode import visible_token
from mlm_scratch.loader import Step, TokenRows
from mlm_scratch.parallel.ranks import all_ranks
from mlm_scratch.report.card import settings
from mlm_scratch.report.first_row import MAX_TOKENS, first_row_lines
from mlm_scratch.run.build import prepare
from mlm_scratch.run.checkpoint import size_of
from mlm_scratch.run.directory import check_output_dir
from mlm_scratch.run.session import smaller_batches
from mlm_scratch.run.state import Training
from mlm_scratch.speed import graph
from mlm_scratch.util.errors import UserError, out_of_memory_means
from mlm_scratch.util.runs import RUNS

SAMPLE = 2_000  # documents whose lengths are looked at
WARM_UP, TIMED = 1, 3  # steps
EVALUATED = 4  # batches


def dry_run(config: TrainConfig) -> None:
    """Prepare a run, show what it would do, time three steps, and stop.

    The prepared text stays in the cache, from which the run will start.

    Raises:
        UserError: as the run itself would.
    """
    with all_ranks() as ranks, ExitStack() as held:
        ranks.rank0_decides(lambda: _check_output_dir(config.output.output_dir))
        print(*settings_lines(config), sep="\n", flush=True)
        t = prepare(config, None, ranks)
        held.callback(t.source.close)
        held.enter_context(t.precision.tf32())
        for lines in (text_lines, length_lines, plan_lines, disk_lines, step_lines):
            for line in lines(t):
                print(line, flush=True)
    print("a dry run: no run was begun")


def _check_output_dir(output_dir: str | None) -> None:
    """Raise UserError if the run could not be written there, as far as that shows beforehand."""
    check_output_dir(output_dir)
    nearest = _existing(Path(output_dir or RUNS).absolute())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"cannot make the run directory: {nearest} is no directory to write to")


def settings_lines(config: TrainConfig) -> Iterator[str]:
    """Yield the settings that are not those of the recipe, by section."""
    yield f"settings that differ from the recipe {config.recipe}:"
    of_recipe = settings(RECIPES[config.recipe])
    for section, values in settings(config).items():
        own = [f"{k} {v}" for k, v in values.items() if of_recipe[section].get(k) != v]
        if own:
            yield f"  {section}: {', '.join(own)}"


def text_lines(t: Training) -> Iterator[str]:
    """Yield the first document, its tokens, a row with its borders, a row of the first batch."""
    lines = t.config.text.grouping == "lines"
    text = next(text for text in t.documents if text.strip() or not lines)
    shown = f"{text[:80]!r}" + (" ..." if len(text) > 80 else "")
    yield f"the first document, {len(text):,} characters: {shown}"
    tokenized = (ids for ids, _ in tokenize(t.documents, t.tokenizer, t.config))
    first = next(tokenized)
    yield f"  its {len(first):,} tokens: {_tokens(t, first)}"
    if isinstance(rows := t.source, PreparedRows):  # not a stream
        # The row in which the second document begins, if it is not a row of its own.
        row = 0 if lines else min(len(first) // t.config.text.block_size, len(rows) - 1)
        begin, end = rows.starts[row], rows.starts[row + 1]
        ends = accumulate(map(len, chain([first], tokenized)))
        borders = [0, *takewhile(lambda border: border < end, ends)]
        within = [int(border - begin) for border in borders if border >= begin]
        places = ", ".join(map(str, within)) or "none of its tokens"
        yield f"row {row}, {end - begin} tokens; a document begins at {places}:"
        for start in sorted({0, *within})[:3]:
            yield f"  {start}: {_tokens(t, rows.tokens[begin + start : end].tolist())}"
    yield from first_row_lines(t.source, t.loader.rows_per_step, t.tokenizer, t.config)


def _tokens(t: Training, ids: list[int]) -> str:
    more = " ..." if len(ids) > MAX_TOKENS else ""
    return " ".join(visible_token(id, t.tokenizer) for id in ids[:MAX_TOKENS]) + more


def length_lines(t: Training) -> Iterator[str]:
    """Yield how long the documents are, and what is cut off."""
    whole = changed(t.config, grouping="blocks", whole_word=False)  # cuts nothing off
    texts = _sample(t.documents)
    if t.config.text.grouping == "lines":  # which skips those without text
        texts = filter(str.strip, texts)
    lengths = [len(ids) for ids, _ in tokenize(texts, t.tokenizer, whole)]
    median, most = (int(np.quantile(lengths, share)) for share in (0.5, 0.99))
    yield (
        f"tokens per document: median {median:,}, 99 % have at most {most:,} "
        f"({len(lengths):,} documents looked at)"
    )
    if t.config.text.grouping == "lines":
        size = t.config.text.block_size
        cut = sum(max(0, length - size) for length in lengths) / sum(lengths)
        yield f"cut off by --block-size {size}: {cut:.1%} of the tokens"


def _sample(documents: Documents) -> Iterator[str]:
    """Yield SAMPLE documents, evenly over the text; of a stream, the first ones."""
    try:
        every = math.ceil(len(documents) / SAMPLE)
    except TypeError:
        return islice(documents, SAMPLE)
    indices = range(0, len(documents), every)
    return iter(replace(documents, rows=documents.rows.select(indices)))


def plan_lines(t: Training) -> Iterator[str]:
    """Yield the steps, evaluations and checkpoints to come."""
    settings = t.config.optimization
    yield (
        f"steps: {t.total_steps:,} ({t.total_steps / t.loader.steps_per_epoch:.3g} epochs of "
        f"{t.loader.steps_per_epoch:,}), {t.loader.rows_per_step:,} rows per step (batch size "
        f"{settings.batch_size} x {settings.accumulate} accumulated x {t.ranks.size} processes)"
    )
    n, first = _evaluations(t)
    shown = ", ".join(f"{step:,}" for step in first)
    more = f", ..., {t.total_steps:,}" if n > 3 else ""
    yield f"evaluations: {n:,}" + (
        f", after steps {shown}{more}; {_rows_to_evaluate(t):,} rows each" if n else ""
    )


def disk_lines(t: Training) -> Iterator[str]:
    """Yield the checkpoints to come, and the space that they take."""
    output = t.config.output
    n, _ = _due(output.save_every, t.total_steps)
    size, of_model = size_of(t.hf_model, with_state=True), size_of(t.hf_model, with_state=False)
    # The newest is written before the oldest goes; with --best each may keep the best of its time.
    best = t.config.evaluation.best
    written = n + best * _evaluations(t)[0]
    kept = min(written, (2 if best else 1) * output.keep + 1)
    needed = kept * size + of_model
    directory = Path(output.output_dir or RUNS).absolute()
    free = shutil.disk_usage(_existing(directory)).free
    yield (
        f"checkpoints: {n:,} of {_gigabytes(size)}"
        f"{', and of each evaluation that is the best' * best}, the newest {output.keep} are kept: "
        f"with model/ {_gigabytes(needed)} at most; free: {_gigabytes(free)}"
    )
    if needed > free and t.ranks.is_first:
        print(f"warning: the disk has no room for the checkpoints of {directory}", file=sys.stderr)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def step_lines(t: Training) -> Iterator[str]:
    """Take three steps after a warm-up, and an evaluation of some batches; yield what they took."""
    # On a GPU some steps come before a graph is captured; with --compile, a second may compile.
    warms_up_long = t.config.machine.compile or t.precision.device.type == "cuda"
    warm_up = graph.WARM_UP + 1 if warms_up_long else WARM_UP
    n_steps, seconds, losses = min(warm_up + TIMED, t.total_steps), [], []
    tokens, positions = 0, 0
    with out_of_memory_means(smaller_batches(t)):
        begin = time.perf_counter()
        for done in loop.run_steps(t.loader.steps(0, n_steps), **t.step_arguments()):
            t.ranks.all_reduce_sum(done.loss)
            losses.append(done.loss.item())  # waits for the GPU
            seconds.append(time.perf_counter() - begin)
            tokens, positions = tokens + done.step.n_tokens, positions + _positions(done.step)
            begin = time.perf_counter()
    timed = seconds[warm_up:]
    median = statistics.median(timed or seconds)
    which = (
        f"median of {len(timed)} after a warm-up" if timed else "of a first one, which is slower"
    )
    size = t.hf_model.config.vocab_size
    yield (
        f"loss of the first step: {losses[0]:.4f} nats per masked token; guessing among {size:,} "
        f"tokens has ln {size} = {math.log(size):.4f}"
    )
    yield (
        f"a step: {median:.3g} s ({which}), "
        f"{tokens / n_steps / median:,.0f} tokens/s; padding is "
        f"{1 - tokens / (positions * t.ranks.size):.1%} of what is computed"
    )
    evaluation = _seconds_of_evaluation(t)  # after the steps, beside whose memory it has to fit
    yield from _memory_line(t)
    line = f"to the end: {tqdm.format_interval(median * t.total_steps)} of steps"
    if evaluation:
        n, _ = _evaluations(t)
        line += f", {tqdm.format_interval(n * evaluation)} of {n:,} evaluations"
    yield line


def _evaluations(t: Training) -> tuple[int, list[int]]:
    """Count the evaluations to come, and list the steps of the first three."""
    if not t.evaluates_at(t.total_steps):
        return 0, []
    n, first = _due(t.evaluation_interval, t.total_steps)
    before = [0] if t.evaluates_at(0) else []
    return len(before) + n, [*before, *first][:3]


def _due(every: int, total: int) -> tuple[int, list[int]]:
    """Count the steps from 1 on for which `Training.due` holds, and list the first three."""
    regular = range(every, total + 1, every) if every else range(0)
    last = [] if total in regular else [total]
    return len(regular) + len(last), [*regular[:3], *last][:3]


def _existing(directory: Path) -> Path:
    return next(d for d in (directory, *directory.parents) if os.path.exists(d))


def _positions(step: Step) -> int:
    return sum(batch.labels.numel() for batch in step.batches)


def _seconds_of_evaluation(t: Training) -> float:
    """Estimate the time of an evaluation from its first batches; 0 without one."""
    if not t.eval_rows:
        return 0.0
    rows = t.eval_rows[""]
    n = min(len(rows), EVALUATED * t.config.evaluation.eval_batch_size)
    first = TokenRows(rows.tokens, rows.starts[: n + 1], rows.gap_before)
    for _ in range(2):  # the first one allocates, or compiles
        begin = time.perf_counter()
        t.evaluate_on(first)
    return (time.perf_counter() - begin) * _rows_to_evaluate(t) / n


def _rows_to_evaluate(t: Training) -> int:
    return sum(map(len, t.eval_rows.values()))


def _memory_line(t: Training) -> Iterator[str]:
    if t.precision.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(t.precision.device)
        yield f"peak memory of the GPU so far: {_gigabytes(peak)}"
        return
    with suppress(ImportError):  # Windows has no such module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        yield f"peak memory of this process so far: {_gigabytes(peak)}"

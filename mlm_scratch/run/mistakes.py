"""Settings that are allowed but probably mistakes: named before the first step of every run."""

from collections.abc import Iterator

import numpy as np

from mlm_scratch.config import as_steps
from mlm_scratch.data.rows import PreparedRows
from mlm_scratch.data.stream import ShardedStream
from mlm_scratch.run.load import Loaded

MANY_PASSES = 100  # over the same rows
FINE_TUNING, FROM_SCRATCH = 5e-4, 5e-5  # rates above the one, below the other, do not fit
MOSTLY, NEARLY_ALL = 0.5, 0.99  # of the rows
SHARED = 0.1  # of the evaluation documents
FEW = 10  # masked tokens in an evaluation


def mistakes(loaded: Loaded, total_steps: int, steps_per_epoch: int) -> Iterator[str]:
    """Yield what looks like a mistake in a run of so many optimizer steps, a sentence each."""
    config, source, shared = loaded.config, loaded.source, loaded.shared_share
    settings, size = config.optimization, config.text.block_size
    if (warmup := as_steps(settings.warmup_steps, total_steps)) >= total_steps > 1:
        yield (
            f"--warmup-steps: the rate rises for {warmup:,} steps, but the run has "
            f"{total_steps:,}: it never reaches --lr"
        )
    decay = as_steps(settings.decay_steps, total_steps) if settings.schedule == "wsd" else 0
    if total_steps > 1 and decay and warmup < total_steps < warmup + decay:
        yield (
            f"--warmup-steps {warmup:,} and --decay-steps {decay:,} are more than the "
            f"{total_steps:,} steps of the run: it never reaches --lr"
        )
    passes = total_steps / steps_per_epoch
    if passes > MANY_PASSES and not config.evaluation.patience:
        yield (
            f"{total_steps:,} steps read each of the {len(source):,} rows {passes:,.0f} times: is "
            "that all of the text, and the right --max-steps or --epochs?"
        )
    if config.model.init == "scratch" and settings.lr < FROM_SCRATCH:
        yield f"--lr {settings.lr:g} is a rate to fine-tune with, but the model starts at random"
    if config.model.init != "scratch" and settings.lr > FINE_TUNING:
        yield f"--lr {settings.lr:g} fits random weights; it can destroy pretrained ones"
    if shared > SHARED:
        yield (
            f"{shared:.0%} of the documents to evaluate on are in the training text, too: their "
            "loss measures memorization"
        )
    for name, rows in loaded.eval_rows.items():
        n, which = rows.starts[-1], f" ({name})" if name else ""
        if (masked := n * config.evaluation.eval_mlm_probability) < FEW:
            yield (
                f"of the {n:,} tokens to evaluate on{which} about {masked:.2g} are masked, too few "
                "for a loss: use more text, or a higher --eval-mlm-probability"
            )
    if isinstance(source, ShardedStream):
        files, shards = loaded.documents.rows.num_shards, len(source.positions)
        if files < shards:
            yield (
                f"--streaming: each of {shards} shards reads all {files} files and keeps one "
                f"document in {shards}: split the text into {shards} files, or a multiple"
            )
    if isinstance(source, PreparedRows) and config.text.grouping == "lines":
        lengths = np.diff(source.starts)  # (rows,)
        if (full := np.mean(lengths == size)) > MOSTLY:
            yield (
                f"{full:.0%} of the documents fill all {size} tokens of --block-size, and what is "
                "longer is cut off: make it larger, or use --grouping blocks"
            )
        longest = int(np.quantile(lengths, NEARLY_ALL))
        if 4 * longest <= size:
            yield (
                f"--block-size {size}, but {NEARLY_ALL:.0%} of the documents have at most "
                f"{longest} tokens: the {settings.batch_size} rows of a batch are short; take more "
                "of them (--batch-size), or several documents per row (--grouping blocks)"
            )

"""Loss, perplexity and accuracy on held-out text, with the same masks every time.

Trainer draws new masks for each evaluation and averages over batches, so that its curve moves even
if the model does not change. Here one seed fixes the masks, and all masked tokens count equally.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.hf.checks import in_eval_mode
from mlm_scratch.loader import Batch, Collator, TokenRows, batch_of, unchanged
from mlm_scratch.model import MaskedLM
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import Precision
from mlm_scratch.speed.cross_entropy import cross_entropy_sum
from mlm_scratch.util.progress import progress_bar

ROWS_AT_ONCE = 1024  # that are masked together
LARGEST_EXPONENT = math.log(sys.float_info.max)  # 709.8: e to a larger one is infinite


@torch.no_grad()
def evaluate(
    model: MaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenRows,
    config: TrainConfig,
    precision: Precision,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] | None = None,
    arrange: Callable[[Batch], Batch] = unchanged,
) -> dict[str, float] | None:
    """Predict the masked tokens of all rows.

    The masks depend on the seed alone: every rank draws all of them, ROWS_AT_ONCE rows at a time,
    whatever the batch size. The ranks take turns at the batches. The model's train or eval mode is
    kept, and so is every random state (the masks have their own generator, and without dropout
    nothing else is random).

    Returns:
        eval_loss (nats, mean over all masked tokens), perplexity (its exponential) and
        eval_accuracy (share of masked tokens whose top prediction is right), NaN where no token is
        masked; or None if a stop signal comes before the last batch.
    """
    size = config.evaluation.eval_batch_size
    sums = []  # (2,) of each batch: loss and right predictions, read once, at the end
    n_masked = 0
    with in_eval_mode(model):
        batches = masked_batches(tokenizer, rows, config)
        total = math.ceil(len(rows) / size)
        bar = progress_bar(batches, total=total, desc="evaluating", unit=" batches", leave=False)
        for number, batch in enumerate(bar):
            turn = number % ranks.size
            if turn == 0 and stop is not None and stop():
                return None
            n_masked += len(batch.positions)
            if turn != ranks.rank:
                continue
            batch = arrange(batch).to(precision.device)
            with precision.autocast():
                logits, labels = model.masked_logits(batch)  # (N, V), (N,)
            correct = (logits.argmax(dim=1) == labels).sum()  # ()
            sums.append(torch.stack([cross_entropy_sum(logits, labels), correct]))  # (2,)
    totals = torch.zeros(2, dtype=torch.float64)  # added up on the CPU: not every GPU has fp64
    for batch_sums in torch.stack(sums).cpu() if sums else ():
        totals += batch_sums
    ranks.all_reduce_sum(totals)
    loss, accuracy = (totals / n_masked).tolist()
    return {
        "eval_loss": loss,
        "perplexity": perplexity(loss),
        "eval_accuracy": accuracy,
    }


def perplexity(loss: float) -> float:
    """Return e to the loss; infinite where that exceeds the largest float."""
    return math.inf if loss > LARGEST_EXPONENT else math.exp(loss)


def masked_batches(
    tokenizer: PreTrainedTokenizerBase, rows: TokenRows, config: TrainConfig
) -> Iterator[Batch]:
    """Yield all rows in batches for an evaluation, with masks that do not depend on their size."""
    # A new generator with the same seed: the same masks.
    masking = replace(config.masking, mlm_probability=config.evaluation.eval_mlm_probability)
    collator = Collator(tokenizer, **masking.of_collator(), seed=config.optimization.seed)
    size = config.evaluation.eval_batch_size
    for start in range(0, len(rows), ROWS_AT_ONCE):
        masked = collator(rows, np.arange(start, min(start + ROWS_AT_ONCE, len(rows))))  # (R, T)
        for first in range(0, len(masked.labels), size):
            yield without_empty_columns(masked.rows(slice(first, first + size)))


def without_empty_columns(batch: Batch) -> Batch:
    """Cut a batch to its longest row: (B, T) -> (B, T')."""
    if batch.attention_mask is None:
        return batch
    width = int(batch.attention_mask.sum(dim=1).max())
    ids, mask, labels = (tensor[:, :width] for tensor in batch[:3])  # type: ignore[index]
    return batch_of(ids, None if mask.all() else mask, labels)

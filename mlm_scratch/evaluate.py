"""Loss, perplexity and accuracy on held-out text, with the same masks every time.

Trainer draws new masks for each evaluation and averages over batches, so that its curve moves even
if the model does not change. Here one seed fixes the masks, and all masked tokens count equally.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.hf.checks import in_eval_mode
from mlm_scratch.loader import Batch, Collator, TokenRows, unchanged
from mlm_scratch.masking import IGNORE
from mlm_scratch.model import MaskedLM
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import Precision
from mlm_scratch.speed.cross_entropy import cross_entropy_sum
from mlm_scratch.util.progress import progress_bar


@torch.no_grad()
def evaluate(
    model: MaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenRows | None,
    config: TrainConfig,
    precision: Precision,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] | None = None,
    arrange: Callable[[Batch], Batch] = unchanged,
) -> dict[str, float] | None:
    """Predict the masked tokens of all rows.

    The ranks take turns at the batches. Each draws all masks, so that they do not depend on the
    number of ranks. The model's train or eval mode is kept, and so is every random state (the masks
    have their own generator, and without dropout nothing else is random).

    Returns:
        eval_loss (nats, mean over all masked tokens), perplexity (its exponential) and
        eval_accuracy (share of masked tokens whose top prediction is right), NaN where no token is
        masked; nothing without rows; or None if a stop signal comes before the last batch.
    """
    if rows is None:
        return {}
    device = precision.device
    # A new generator with the same seed: the same masks.
    masking = replace(config.masking, mlm_probability=config.evaluation.eval_mlm_probability)
    collator = Collator(tokenizer, **masking.of_collator(), seed=config.optimization.seed)
    batch_size = config.evaluation.eval_batch_size
    sums = []  # (2,) of each batch: loss and right predictions, read once, at the end
    n_masked = 0
    with in_eval_mode(model):
        starts = range(0, len(rows), batch_size)
        bar = progress_bar(starts, desc="evaluating", unit=" batches", leave=False)
        for number, start in enumerate(bar):
            turn = number % ranks.size
            if turn == 0 and stop is not None and stop():
                return None
            end = min(start + batch_size, len(rows))
            batch = arrange(collator(rows, np.arange(start, end)))
            n_masked += int((batch.labels != IGNORE).sum())
            if turn != ranks.rank:
                continue
            with precision.autocast():
                logits, labels = model.masked_logits(batch.to(device))  # (N, V), (N,)
            correct = (logits.argmax(dim=1) == labels).sum()  # ()
            sums.append(torch.stack([cross_entropy_sum(logits, labels), correct]))  # (2,)
    totals = torch.zeros(2, dtype=torch.float64)  # added up on the CPU: not every GPU has fp64
    for batch_sums in torch.stack(sums).cpu() if sums else ():
        totals += batch_sums
    ranks.all_reduce_sum(totals)
    loss, accuracy = (totals / n_masked).tolist() if n_masked else (math.nan, math.nan)
    return {
        "eval_loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # e^710 exceeds the largest float
        "eval_accuracy": accuracy,
    }

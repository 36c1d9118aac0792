"""Loss, perplexity and accuracy on held-out text, with the same masks every time.

Trainer draws new masks for each evaluation and averages over batches, so that its curve moves even
if the model does not change. Here one seed fixes the masks, and all masked tokens count equally.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.rows import TokenRows
from mlm_scratch.hf.checks import in_eval_mode
from mlm_scratch.loader import Collator
from mlm_scratch.masking import IGNORE
from mlm_scratch.model import masked_lm_logits
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import Precision
from mlm_scratch.util.progress import progress_bar

if TYPE_CHECKING:
    from mlm_scratch.run.signals import StopRequest


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenRows,
    config: TrainConfig,
    precision: Precision,
    ranks: Ranks = ALONE,
    stop: "StopRequest | None" = None,
) -> dict[str, float] | None:
    """Predict the masked tokens of all rows.

    The ranks take turns at the batches. Each draws all masks, so that they do not depend on the
    number of ranks. The model's train or eval mode is kept, and so is every
    random state (the masks have their own generator, and without dropout nothing else is random).

    Returns:
        eval_loss (nats, mean over all masked tokens), perplexity (its exponential) and
        eval_accuracy (share of masked tokens whose top prediction is right), NaN where no token is
        masked; or None if a stop signal comes before the last batch.
    """
    collator = Collator(tokenizer, config)  # a new generator with the same seed: the same masks
    device = precision.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # () read once, at the end
    correct = torch.zeros((), dtype=torch.int64, device=device)  # ()
    n_masked = 0
    with in_eval_mode(model):
        starts = range(0, len(rows), config.eval_batch_size)
        bar = progress_bar(starts, desc="evaluating", unit=" batches", leave=False)
        for number, start in enumerate(bar):
            turn = number % ranks.size
            if turn == 0 and stop is not None and stop.agreed_by_all_ranks():
                return None
            end = min(start + config.eval_batch_size, len(rows))
            batch = collator(rows, np.arange(start, end))
            n_masked += int((batch.labels != IGNORE).sum())
            if turn != ranks.rank:
                continue
            with precision.autocast():
                logits, labels = masked_lm_logits(model, batch.to(device))  # (N, V), (N,)
            loss_sum += cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
            correct += (logits.argmax(dim=1) == labels).sum()
    ranks.all_reduce_sum(loss_sum)
    ranks.all_reduce_sum(correct)
    loss = loss_sum.item() / n_masked if n_masked else math.nan
    return {
        "eval_loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # e^710 exceeds the largest float
        "eval_accuracy": correct.item() / n_masked if n_masked else math.nan,
    }

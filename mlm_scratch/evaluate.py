"""Loss, perplexity and accuracy on held-out text, with the same masks every time.

The reference draws new masks for each evaluation and averages over batches, so its curve moves by
itself. Here one seed fixes the masks and every masked token counts the same.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.rows import TokenRows
from mlm_scratch.hf.load import in_eval_mode
from mlm_scratch.loader import Collator
from mlm_scratch.masking import IGNORE
from mlm_scratch.model import masked_lm_logits
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import Precision
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.util.progress import progress_bar


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenRows,
    config: TrainConfig,
    precision: Precision,
    ranks: Ranks = ALONE,
    stop: StopRequest | None = None,
) -> dict[str, float] | None:
    """Predict the masked tokens of all rows; None if a stop signal comes before the last.

    Several processes take the batches in turn. Each draws all masks, so that they are the same for
    any number of processes.

    Training is left as it was: train or eval mode, and every random state (the masks come from a
    generator of their own, and nothing else is random without dropout).

    Returns: eval_loss (nats, mean over all masked tokens), perplexity (e to that power) and
    eval_accuracy (share of masked tokens whose best guess is right); NaN where none is masked.
    """
    collator = Collator(tokenizer, config)  # a new generator with the same seed: the same masks
    device = precision.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # on the device until the end
    correct = torch.zeros((), dtype=torch.int64, device=device)
    n_masked = 0
    with in_eval_mode(model):
        starts = range(0, len(rows), config.eval_batch_size)
        bar = progress_bar(starts, desc="evaluating", unit=" batches", leave=False)
        for number, start in enumerate(bar):
            turn = number % ranks.size
            if turn == 0 and stop is not None and stop.asked():
                return None
            end = min(start + config.eval_batch_size, len(rows))
            batch = collator(rows, np.arange(start, end))
            n_masked += int((batch.labels != IGNORE).sum())
            if turn != ranks.rank:
                continue
            batch = batch.to(device)
            with precision.autocast():
                logits, labels = masked_lm_logits(  # (N, V), (N,)
                    model,
                    batch.input_ids,
                    batch.attention_mask,
                    batch.labels,  # (B, T) each
                    positions=batch.positions,
                    dense=config.dense_head,  # (N,)
                )
            logits = logits.float()
            loss_sum += cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
            correct += (logits.argmax(dim=1) == labels).sum()
    ranks.add_up(loss_sum)
    ranks.add_up(correct)
    loss = loss_sum.item() / n_masked if n_masked else math.nan
    return {
        "eval_loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # e^710 is over the largest float
        "eval_accuracy": correct.item() / n_masked if n_masked else math.nan,
    }

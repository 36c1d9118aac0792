"""How probable a sentence is: its pseudo-log-likelihood, one masked token at a time.

Source: Salazar et al. 2020, Masked Language Model Scoring.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.checks import check_no_nan
from mlm_scratch.hf.encode import encode, find_words, forward

LOGITS_AT_ONCE = 2**27  # rows x tokens x vocabulary: half a gigabyte


@torch.no_grad()
def score_sentence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    truncate: bool = False,
) -> list[tuple[int, float]]:
    """Compute the log probability of each token, special ones excluded, when it alone is masked.

    Their sum is the pseudo-log-likelihood of the sentence, and e to the power of minus their mean
    its pseudo-perplexity.

    Returns:
        (id, log probability in nats) of each token.

    Raises:
        UserError: a text without a token, too long or not UTF-8.
    """
    (input_ids,) = encode(model, tokenizer, [text], truncate)["input_ids"]  # (T,)
    at = find_words(tokenizer, input_ids, text)  # (N,)
    masked_ids = input_ids.repeat(len(at), 1)  # (N, T), one row per token
    masked_ids[torch.arange(len(at)), at] = tokenizer.mask_token_id
    log_p = log_probabilities(model, masked_ids, at[:, None])[:, 0]  # (N, V)
    scores = log_p.gather(1, input_ids[at, None])[:, 0]  # (N,)
    return list(zip(input_ids[at].tolist(), scores.tolist(), strict=True))


def log_probabilities(model: PreTrainedModel, input_ids: Tensor, at: Tensor) -> Tensor:
    """(B, T) ids -> (B, M, V) at the M columns that `at`, (B, M), names for each row."""
    rows_at_once = max(1, LOGITS_AT_ONCE // (input_ids.shape[1] * model.config.vocab_size))
    parts = []
    for rows, columns in zip(input_ids.split(rows_at_once), at.split(rows_at_once), strict=True):
        logits = forward(model, {"input_ids": rows})  # (rows, T, V)
        row = torch.arange(len(rows), device=logits.device)[:, None]  # (rows, 1)
        parts.append(logits[row, columns.to(logits.device)].float().cpu())  # (rows, M, V)
    log_p = torch.cat(parts).log_softmax(dim=-1)  # (B, M, V)
    check_no_nan(log_p)
    return log_p

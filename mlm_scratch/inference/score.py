"""How probable a sentence is: its pseudo-log-likelihood, one masked token at a time.

Sources: Salazar et al. 2020, Masked Language Model Scoring ("original"); Kauf and Ivanova 2023, A
Better Way to Do Masked Language Model Scoring ("word-l2r"). The two differ in words of several
tokens. If only "chlor" of "chlor opl asts" is masked, the other tokens give it away, and a rare
word scores like a common one. Masking the later tokens of the word as well prevents that:

    original    [MASK] opl asts       chlor [MASK] asts      chlor opl [MASK]
    word-l2r    [MASK] [MASK] [MASK]  chlor [MASK] [MASK]    chlor opl [MASK]
"""

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.checks import check_no_nan
from mlm_scratch.hf.encode import encode, find_words, logits_at
from mlm_scratch.util.errors import UserError

METHODS = ("word-l2r", "original")
LOGITS_AT_ONCE = 2**27  # rows x tokens x vocabulary: half a gigabyte


def score_sentence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    truncate: bool = False,
    method: str = "word-l2r",
) -> list[tuple[int, float]]:
    """Compute the log probability of each token, special ones excluded, when it is masked.

    The sum of these is the pseudo-log-likelihood of the sentence, and exp(-mean) its
    pseudo-perplexity.

    Args:
        model: a masked-LM in eval mode.
        tokenizer: its tokenizer.
        text: text without masks.
        truncate: truncate a text that is too long instead of raising UserError.
        method: "original" masks the token alone, "word-l2r" the later tokens of its word, too.

    Returns:
        (id, log probability in nats) of each token.

    Raises:
        UserError: a text without a token, too long or not UTF-8; a tokenizer that does not report
            the words of its tokens, if `method` needs them.
    """
    inputs = encode(model, tokenizer, [text], truncate)
    (input_ids,) = inputs["input_ids"]  # (T,)
    at = find_words(tokenizer, input_ids, text)  # (N,)
    is_masked = torch.arange(len(input_ids)) == at[:, None]  # (N, T), one row per token
    if method == "word-l2r":
        words = _words(inputs)  # (T,)
        is_later = torch.arange(len(input_ids)) > at[:, None]  # (N, T)
        is_masked |= is_later & (words == words[at, None])  # (N, T)
    masked_ids = torch.where(is_masked, tokenizer.mask_token_id, input_ids)  # (N, T)
    log_p = log_probabilities(model, masked_ids, at[:, None])[:, 0]  # (N, V)
    scores = log_p.gather(1, input_ids[at, None])[:, 0]  # (N,)
    return list(zip(input_ids[at].tolist(), scores.tolist(), strict=True))


def _words(inputs: BatchEncoding) -> Tensor:
    """(T,) the number of the word that each token belongs to, -1 at special tokens.

    Words are what the tokenizer counts as such: in byte-level BPE and WordPiece, a full stop is a
    separate word. For --whole-word, as for DataCollatorForLanguageModeling, a full stop belongs to
    the word before it.
    """
    if not inputs.is_fast:
        raise UserError(
            "this tokenizer does not report which tokens form a word: use --score-method original"
        )
    return torch.tensor([-1 if word is None else word for word in inputs.word_ids()])  # (T,)


def log_probabilities(model: PreTrainedModel, input_ids: Tensor, at: Tensor) -> Tensor:
    """(B, T) ids -> (B, M, V) log probabilities at the M positions of each row in `at`, (B, M)."""
    rows_at_once = max(1, LOGITS_AT_ONCE // (input_ids.shape[1] * model.config.vocab_size))
    parts = zip(input_ids.split(rows_at_once), at.split(rows_at_once), strict=True)
    logits = torch.cat([logits_at(model, *part) for part in parts])  # (B, M, V)
    log_p = logits.log_softmax(dim=-1)  # (B, M, V)
    check_no_nan(log_p)
    return log_p

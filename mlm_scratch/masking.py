"""Which tokens to hide, and what to put in their place: the "masked" in masked language modelling.

    input_ids:  <s>  The  Milky  Way   is    a  spiral  galaxy  .  </s>
    chosen:                       x               x                       15 % of the tokens
    model sees: <s>  The  Milky <mask> is    a  spiral  galaxy  .  </s>   (here: mask, keep)
    labels:    -100 -100  -100   Way  -100 -100 spiral  -100  -100 -100

Of the chosen tokens 80 % become the mask token, 10 % a random token and 10 % stay. The mask token
never occurs when the model is used for anything else; if only masks had to be predicted, nothing
would make the model remember, at a visible token, what stands there. So each visible token may be a
wrong one or be asked for, and every position must keep a good idea of what belongs there (Devlin et
al. 2019, BERT, section 3.1 and appendix C.2). The other files call all chosen tokens masked tokens,
as the literature does.

The reference is `DataCollatorForLanguageModeling` of transformers: with the same generator the
result here is the same bit for bit (tests/test_masking.py).
"""

import torch
from torch import Tensor

IGNORE = -100  # the label that torch's cross_entropy skips (its default ignore_index)


def mask_tokens(
    input_ids: Tensor,
    special_tokens_mask: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    mlm_probability: float = 0.15,
    mask_replace_prob: float = 0.8,
    random_replace_prob: float = 0.1,
    word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide a random part of the tokens and say what the model has to predict.

    Args:
        input_ids: (B, T) token ids. Not changed.
        special_tokens_mask: (B, T), true (or 1) where a token must never be chosen.
        mask_token_id: id of the tokenizer's mask token.
        vocab_size: random tokens are drawn from 0 ... vocab_size - 1.
        mlm_probability: share of the tokens to choose, 0 to 1.
        mask_replace_prob: share of the chosen tokens that become the mask token, 0 to 1.
        random_replace_prob: share of the chosen tokens that become a random one; the rest stay.
        word_ids: (B, T), equal for neighbouring tokens of one word, -1 outside words. If given,
            words are chosen instead of tokens, and all tokens of a word meet the same fate.
        generator: source of all randomness (a CPU generator for CPU tensors); None: torch's own.

    Returns:
        (input_ids, labels), both (B, T) and new: what the model sees, and the original id at every
        chosen position, -100 elsewhere.

    Raises:
        ValueError: a probability outside 0 to 1, or two that add up to more than 1.

    Source: DataCollatorForLanguageModeling.torch_mask_tokens; the four draws below have its shapes
    and come in its order. It handles whole words with the mask token only.
    """
    _check_probabilities(mlm_probability, mask_replace_prob, random_replace_prob)
    never = special_tokens_mask.bool()  # (B, T)
    if word_ids is not None:
        never = never | (word_ids == -1)  # (B, T)
        first_of_word = _first_of_word(word_ids.masked_fill(never, -1))  # (B, T) columns

    def toss(probability: float) -> Tensor:
        """A biased coin for each position; with whole words, that of the word's first token."""
        biases = torch.full(input_ids.shape, float(probability), device=input_ids.device)  # (B, T)
        heads = torch.empty_like(biases, dtype=torch.bool)  # (B, T)
        heads.bernoulli_(biases, generator=generator)
        return heads if word_ids is None else heads.gather(1, first_of_word)  # (B, T)

    # Draw 1: which tokens the model has to predict.
    chosen = toss(mlm_probability) & ~never  # (B, T)
    labels = torch.where(chosen, input_ids, IGNORE)  # (B, T)

    # Draw 2: which of those become the mask token.
    masked = toss(mask_replace_prob) & chosen  # (B, T)
    input_ids = input_ids.masked_fill(masked, mask_token_id)  # (B, T)
    if mask_replace_prob == 1 or random_replace_prob == 0:
        return input_ids, labels  # without draws 3 and 4, as in the reference

    # Draws 3 and 4: which of the others become a random token, and which one. "10 % of all chosen"
    # is half of the 20 % left over.
    share_of_rest = random_replace_prob / (1 - mask_replace_prob)
    randomized = toss(share_of_rest) & chosen & ~masked  # (B, T)
    random_ids = torch.randint(  # (B, T)
        vocab_size, input_ids.shape, generator=generator, device=input_ids.device
    )
    return torch.where(randomized, random_ids, input_ids), labels


def word_ids_from_gaps(gap_before: Tensor, special_tokens_mask: Tensor) -> Tensor:
    """Number the words of each row, given where a word may start.

    Args:
        gap_before: (B, T) bool, true where the text has a gap before the token.
        special_tokens_mask: (B, T) bool.

    Returns: (B, T) int64 word numbers counted from 1; -1 at special tokens.

    Source: DataCollatorForLanguageModeling._calc_word_ids_and_prob_mask, which counts a token as
    the first of a word after a gap, after a special token and at the start of a row.
    """
    new_word = gap_before.clone()  # (B, T)
    new_word[:, 0] = True
    new_word[:, 1:] |= special_tokens_mask[:, :-1]
    new_word &= ~special_tokens_mask
    return new_word.cumsum(dim=1).masked_fill(special_tokens_mask, -1)  # (B, T)


def _first_of_word(word_ids: Tensor) -> Tensor:
    """(B, T): the column at which the word of each position starts (anything where id is -1)."""
    starts = torch.ones_like(word_ids, dtype=torch.bool)  # (B, T)
    starts[:, 1:] = word_ids[:, 1:] != word_ids[:, :-1]
    columns = torch.arange(word_ids.shape[1], device=word_ids.device)  # (T,)
    return torch.where(starts, columns, 0).cummax(dim=1).values  # (B, T)


def _check_probabilities(mlm: float, mask: float, random: float) -> None:
    for name, value in (
        ("mlm_probability", mlm),
        ("mask_replace_prob", mask),
        ("random_replace_prob", random),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    if mask + random > 1:
        raise ValueError(
            f"mask_replace_prob {mask} and random_replace_prob {random} add up to more than 1"
        )

"""Which tokens to hide and what to put there: the "masked" in masked language modelling.

    input_ids:  <s>  The  Milky  Way   is    a  spiral  galaxy  .  </s>
    selected:                     x               x                       15 % on average
    model sees: <s>  The  Milky <mask> is    a  spiral  galaxy  .  </s>   (Way: mask, spiral: keep)
    labels:    -100 -100  -100   Way  -100 -100 spiral  -100  -100 -100

Of the selected tokens 80 % become the mask token, 10 % a random token, and 10 % stay as they are.
`<mask>` never occurs downstream. Trained on masks alone, the model need not encode the tokens that
it can see; with 10 % random and 10 % unchanged, any visible token may be wrong or be a target
(Devlin et al. 2019, BERT, section 3.1 and appendix C.2). Everywhere else "masked tokens" means all
selected tokens, whatever the model sees in their place, as in the literature.

`mask_tokens` takes two steps: `select` draws the tokens to predict, `corrupt` what the model sees
in their place. Another masking, such as spans, replaces one of the two (loader.py: Collator.mask).

Given the same generator, the result equals that of transformers' `DataCollatorForLanguageModeling`
bit for bit (tests/test_masking.py).
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
    """Mask a random subset of the tokens, and label them with the ids that the model must predict.

    Args:
        input_ids: (B, T) token ids. Not changed.
        special_tokens_mask: (B, T), true (or 1) where a token must never be selected.
        mask_token_id: id of the tokenizer's mask token.
        vocab_size: random tokens are drawn from 0 ... vocab_size - 1, special ones included.
        mlm_probability: share of the tokens to select, 0 to 1.
        mask_replace_prob: share of the selected tokens that become the mask token, 0 to 1.
        random_replace_prob: share of the selected tokens that become a random one; the rest stay.
        word_ids: (B, T), equal for neighbouring tokens of one word, -1 outside words. If given,
            words are selected instead of tokens, and all tokens of a word are masked, replaced or
            kept together.
        generator: source of all randomness (a CPU generator for CPU tensors); None: torch's own.

    Returns:
        (input_ids, labels), both (B, T) and new: what the model sees, and the original id at every
        selected position, -100 elsewhere.

    Raises:
        ValueError: a probability outside 0 to 1, or two that add up to more than 1.

    Source: DataCollatorForLanguageModeling.torch_mask_tokens (whole words: mask token only).
    """
    for probability in (mlm_probability, mask_replace_prob, random_replace_prob):
        if not 0 <= probability <= 1:
            raise ValueError(f"a probability must be between 0 and 1, got {probability}")
    if mask_replace_prob + random_replace_prob > 1:
        raise ValueError("mask_replace_prob and random_replace_prob add up to more than 1")
    protected = special_tokens_mask.bool()  # (B, T)
    if word_ids is not None:  # whole words: skip at first
        protected = protected | (word_ids == -1)  # (B, T)
        word_ids = word_ids.masked_fill(protected, -1)  # (B, T)
    selected = select(protected, mlm_probability, word_ids, generator)  # (B, T)
    labels = torch.where(selected, input_ids, IGNORE)  # (B, T)
    seen = corrupt(  # (B, T)
        input_ids,
        selected,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        mask_replace_prob=mask_replace_prob,
        random_replace_prob=random_replace_prob,
        word_ids=word_ids,
        generator=generator,
    )
    return seen, labels


def select(
    protected: Tensor,
    probability: float,
    word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Select the tokens to predict, (B, T) bool: each one that is not protected, by chance."""
    return draw(protected, probability, word_ids, generator) & ~protected  # draw 1


def corrupt(
    input_ids: Tensor,
    selected: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    mask_replace_prob: float = 0.8,
    random_replace_prob: float = 0.1,
    word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace the selected tokens: (B, T) ids and (B, T) bool -> (B, T) ids that the model sees."""
    # Draw 2: which of the selected become the mask token. Drawn for every position, then restricted
    # to the selected: same number of draws as Hugging Face, hence bit-identical.
    masked = draw(selected, mask_replace_prob, word_ids, generator) & selected  # (B, T)
    input_ids = input_ids.masked_fill(masked, mask_token_id)  # (B, T)
    if mask_replace_prob == 1 or random_replace_prob == 0:
        return input_ids  # the collator skips draws 3 and 4 here, too

    # Draws 3 and 4: which of the others become a random token, and which one. "10 % of the
    # selected" is half of the 20 % that are left.
    share_of_rest = random_replace_prob / (1 - mask_replace_prob)
    rest = selected & ~masked  # (B, T)
    randomized = draw(selected, share_of_rest, word_ids, generator) & rest  # (B, T)
    random_ids = torch.randint(  # (B, T)
        vocab_size, input_ids.shape, generator=generator, device=input_ids.device
    )
    return torch.where(randomized, random_ids, input_ids)


def draw(
    like: Tensor,
    probability: float,
    word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw true or false for each position of `like`, (B, T); for whole words, once per word."""
    # full_like would copy the strides of `like`, and the order of the draws with them.
    probabilities = torch.full(like.shape, float(probability), device=like.device)  # (B, T)
    drawn = torch.empty_like(probabilities, dtype=torch.bool)  # (B, T)
    drawn.bernoulli_(probabilities, generator=generator)
    return drawn if word_ids is None else drawn.gather(1, _first_of_word(word_ids))  # (B, T)


# ---- Whole words (skip at first) -----------------------------------------------------------------


def _first_of_word(word_ids: Tensor) -> Tensor:
    """(B, T): the column where the word of each position starts (meaningless where id is -1).

    Source: DataCollatorForLanguageModeling._calc_word_ids_and_prob_mask.
    """
    starts = torch.ones_like(word_ids, dtype=torch.bool)  # (B, T)
    starts[:, 1:] = word_ids[:, 1:] != word_ids[:, :-1]
    columns = torch.arange(word_ids.shape[1], device=word_ids.device)  # (T,)
    return torch.where(starts, columns, 0).cummax(dim=1).values  # (B, T)

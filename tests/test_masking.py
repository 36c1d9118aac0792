"""mask_tokens against DataCollatorForLanguageModeling, and against its definition."""

import itertools
import warnings

import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from mlm_scratch.masking import IGNORE, mask_tokens
from tests.support.tiny import SENTENCES, byte_level_tokenizer, wordpiece_tokenizer

TOKENIZERS = [byte_level_tokenizer(), wordpiece_tokenizer()]
PROBABILITIES = [
    (0.15, 0.8, 0.1),
    (0.5, 0.5, 0.4),
    (1.0, 0.7, 0.3),
    (0.3, 1.0, 0.0),
    (0.3, 0.0, 1.0),
    (0.3, 0.9, 0.0),
    (0.0, 0.8, 0.1),
    (0.3, 0.0, 0.0),
    (1, 1, 0),
    (1, 0, 1),
]
SHAPES = [(1, 1), (2, 7), (8, 128), (33, 20)]


def special_mask(tokenizer, input_ids):
    return torch.tensor(
        [
            tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
            for row in input_ids.tolist()
        ]
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level BPE", "WordPiece"])
@pytest.mark.parametrize("mlm, mask, random", PROBABILITIES)
def test_equal_to_the_collator_bit_for_bit(tokenizer, mlm, mask, random):
    """Twenty batches of changing shape from one generator each: neither draws more or less."""
    hf_collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=mlm, mask_replace_prob=mask, random_replace_prob=random, seed=7
    )
    generator = torch.Generator().manual_seed(7)
    data = torch.Generator().manual_seed(0)
    for shape in itertools.islice(itertools.cycle(SHAPES), 20):
        input_ids = torch.randint(len(tokenizer), shape, generator=data)
        expected = hf_collator([{"input_ids": row} for row in input_ids.clone()])
        seen, labels = mask_tokens(
            input_ids,
            special_mask(tokenizer, input_ids),
            mask_token_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            mlm_probability=mlm,
            mask_replace_prob=mask,
            random_replace_prob=random,
            generator=generator,
        )
        assert torch.equal(seen, expected["input_ids"])
        assert torch.equal(labels, expected["labels"])


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level BPE", "WordPiece"])
@pytest.mark.parametrize("mlm", [0.15, 0.5, 1.0])
def test_whole_words_equal_to_the_collator_bit_for_bit(tokenizer, mlm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets mask_replace_prob to 1
        hf_collator = DataCollatorForLanguageModeling(
            tokenizer, whole_word_mask=True, mlm_probability=mlm, seed=3
        )
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        encoding = tokenizer(
            SENTENCES,
            padding=True,
            return_offsets_mapping=True,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        features = {
            key: encoding[key] for key in ("input_ids", "special_tokens_mask", "offset_mapping")
        }
        expected = hf_collator(
            [
                {key: value[row].clone() for key, value in features.items()}
                for row in range(len(SENTENCES))
            ]
        )
        special = encoding["special_tokens_mask"].bool()
        starts, ends = encoding["offset_mapping"].unbind(-1)
        gap_before = starts != ends.roll(1, dims=1)
        seen, labels = mask_tokens(
            encoding["input_ids"],
            special,
            word_ids=gap_before.cumsum(dim=1),
            mask_token_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            mlm_probability=mlm,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
            generator=generator,
        )
        assert torch.equal(seen, expected["input_ids"])
        assert torch.equal(labels, expected["labels"])


def test_the_tokens_of_a_word_get_the_same_treatment():
    """Words are masked, randomised or kept 80/10/10, all their tokens together."""
    B, T, vocab_size, mask_id = 400, 60, 10**6, 10**6
    word_ids = (torch.arange(T) // 3).expand(B, T)  # words of three tokens
    input_ids = torch.zeros(B, T, dtype=torch.long)
    seen, labels = mask_tokens(
        input_ids,
        torch.zeros(B, T),
        word_ids=word_ids,
        mask_token_id=mask_id,
        vocab_size=vocab_size,
        mlm_probability=0.3,
        generator=torch.Generator().manual_seed(0),
    )
    selected, seen = (labels != IGNORE).view(B, -1, 3), seen.view(B, -1, 3)
    assert torch.equal(selected.any(-1), selected.all(-1))
    masked, kept = (seen == mask_id), (seen == 0) & selected
    randomised = selected & ~masked & ~kept
    for treated in (masked, randomised):  # a random id is 0 once in a million: never here
        assert torch.equal(treated.any(-1), treated.all(-1))
    words = selected.all(-1).sum().item()
    assert words / (B * T / 3) == pytest.approx(0.3, abs=0.02)  # sd 0.005
    for treated, share in ((masked, 0.8), (randomised, 0.1), (kept, 0.1)):
        assert treated.all(-1).sum().item() / words == pytest.approx(share, abs=0.03)  # sd <= 0.008


def test_words_end_where_ids_change_and_at_special_tokens():
    special = torch.tensor([1, 0, 0, 0, 1, 0, 0]).expand(1000, 7)
    word_ids = torch.tensor([1, 1, 1, 2, 2, 2, 2]).expand(1000, 7)
    _, labels = mask_tokens(
        special, special, mask_token_id=9, vocab_size=9, mlm_probability=0.5, word_ids=word_ids
    )
    selected = (labels != IGNORE).T  # (T, B)
    assert not selected[0].any() and not selected[4].any()
    together = [[torch.equal(one, other) for other in selected] for one in selected]
    words = [[0, 4], [1, 2], [3], [5, 6]]  # at first those of no word
    assert together == [
        [any({i, j} <= {*word} for word in words) for j in range(7)] for i in range(7)
    ]


def test_positions_outside_words_are_never_selected():
    word_ids = torch.tensor([[-1, 4, 4, -1, 7]])
    _, labels = mask_tokens(
        torch.tensor([[5, 6, 7, 8, 9]]),
        torch.tensor([[0, 0, 0, 0, 1]]),
        word_ids=word_ids,
        mask_token_id=0,
        vocab_size=10,
        mlm_probability=1.0,
    )
    assert labels.tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE]]


def test_the_draws_do_not_depend_on_the_memory_layout():
    input_ids = torch.randint(5, 50, (6, 9))
    special = input_ids % 7 == 0
    results = [
        mask_tokens(
            *tensors,
            mask_token_id=4,
            vocab_size=50,
            mlm_probability=0.5,
            generator=torch.Generator().manual_seed(0),
        )
        for tensors in (
            (input_ids, special),
            (input_ids.t().contiguous().t(), special.t().contiguous().t()),
        )
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_shares_are_as_specified_and_special_tokens_untouched():
    """10^6 tokens: one seed in 10^6 exceeds the bounds (5 sd)."""
    B, T, vocab_size, mask_id = 1000, 1000, 50_000, 50_000
    input_ids = torch.arange(B * T).view(B, T) % vocab_size
    special = input_ids % 10 == 0  # every tenth token
    before = input_ids.clone()
    seen, labels = mask_tokens(
        input_ids,
        special,
        mask_token_id=mask_id,
        vocab_size=vocab_size,
        generator=torch.Generator().manual_seed(42),
    )
    selected = labels != IGNORE
    assert torch.equal(input_ids, before)
    assert not selected[special].any() and torch.equal(seen[special], before[special])
    assert torch.equal(labels[selected], before[selected])
    assert torch.equal(seen[~selected], before[~selected])
    n = selected.sum().item()
    assert n / (~special).sum().item() == pytest.approx(0.15, abs=0.002)
    masked = (seen == mask_id).sum().item()
    kept = (seen[selected] == before[selected]).sum().item()
    assert masked / n == pytest.approx(0.8, abs=0.006)
    assert kept / n == pytest.approx(0.1, abs=0.005)
    assert (n - masked - kept) / n == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mlm_probability": 1.1},
        {"mask_replace_prob": -0.1},
        {"random_replace_prob": 2},
        {"mask_replace_prob": 0.8, "random_replace_prob": 0.3},
    ],
)
def test_impossible_probabilities_are_rejected(wrong):
    row = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"between 0 and 1|more than 1"):
        mask_tokens(row, row, mask_token_id=1, vocab_size=5, **wrong)

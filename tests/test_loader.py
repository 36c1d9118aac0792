"""Steps, batches and masks, on rows of ids that can be followed by eye."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from mlm_scratch.loader import Collator, Loader, TokenRows, epoch_order, unchanged
from mlm_scratch.masking import IGNORE
from mlm_scratch.speed.packing import Layout
from tests.support.tiny import byte_level_tokenizer


class ToyTokenizer:
    """What the collator reads from a tokenizer: 0 <pad>, 1 <s>, 2 </s>, 3 <mask>."""

    pad_token_id, mask_token_id, all_special_ids = 0, 3, [0, 1, 2, 3]

    def get_vocab(self):
        return {str(token): token for token in range(1000)}

    def __len__(self):
        return 1000


def rows_of(*lengths):
    """Rows 10 11 12 ..., 20 21 22 ..., and so on, of these lengths."""
    tokens = [10 * row + i for row, length in enumerate(lengths, 1) for i in range(length)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TokenRows(np.array(tokens, np.uint16), starts)


def loader(rows, *, batch_size=8, accumulate=1, mask_rates=(0.15, 0.15), arrange=unchanged):
    collator = Collator(ToyTokenizer(), mask_rates=mask_rates)
    rows_per_step = batch_size * accumulate
    return Loader(
        rows, collator, rows_per_step=rows_per_step, batch_size=batch_size, arrange=arrange
    )


def originals(batch):
    """The rows before masking."""
    return torch.where(batch.labels == IGNORE, batch.input_ids, batch.labels)


def test_rows_are_padded_to_the_longest_of_their_step():
    step = next(loader(rows_of(3, 1, 5), batch_size=3).steps(0, 1))
    (batch,) = step.batches
    order = epoch_order(3, 42, 0)
    expected = [[10, 11, 12, 0, 0], [20, 0, 0, 0, 0], [30, 31, 32, 33, 34]]
    assert originals(batch).tolist() == [expected[row] for row in order]
    assert batch.attention_mask.sum(1).tolist() == [(3, 1, 5)[row] for row in order]
    assert (batch.labels[batch.attention_mask == 0] == IGNORE).all()
    assert step.n_tokens == 9
    assert step.n_masked == (batch.labels != IGNORE).sum() == len(batch.positions)
    assert (batch.labels.flatten()[batch.positions] != IGNORE).all()


def test_words_end_at_gaps_and_special_tokens():
    """A special token ends a word even where the text has no gap after it."""
    given = []

    class Noting(Collator):
        def mask(self, input_ids, special, word_ids, rate):
            given.append(word_ids)
            return super().mask(input_ids, special, word_ids, rate)

    special = ToyTokenizer.all_special_ids[0]
    tokens = np.array([special, 11, 12, 13, special, 14, 15], np.uint16)
    gap_before = np.array([0, 0, 0, 1, 0, 0, 0], bool)
    rows = TokenRows(tokens, np.array([0, 7]), gap_before)
    Noting(ToyTokenizer())(rows, np.array([0]))
    assert given[0].tolist() == [[-1, 0, 0, 1, -1, 1, 1]]


def test_padding_is_never_masked_even_if_its_id_is_a_word():
    """A tokenizer without a padding token: id 0, which fills the gaps, is a word."""
    tokenizer = ToyTokenizer()
    tokenizer.pad_token_id, tokenizer.all_special_ids = None, [1, 2, 3]
    collator = Collator(tokenizer, mask_rates=(1.0, 1.0))
    batch = collator(rows_of(3, 1), np.arange(2))
    assert batch.labels.tolist() == [[10, 11, 12], [20, IGNORE, IGNORE]]


def test_rows_without_padding_have_no_attention_mask():
    """A model reads a mask that it is given, which on a GPU makes the CPU wait."""
    step = next(loader(rows_of(4, 4, 4), batch_size=2, accumulate=2).steps(0, 1))
    assert [batch.attention_mask for batch in step.batches] == [None, None]
    assert [len(batch.labels) for batch in step.batches] == [2, 1] and step.n_tokens == 12


def test_a_compiled_model_gets_the_same_number_of_positions_in_every_batch():
    rows = rows_of(*[32] * 64)
    settings = {"batch_size": 4, "accumulate": 2}
    plain, static = (
        list(loader(rows, arrange=arrange, **settings).steps(0, 8))
        for arrange in (unchanged, Layout(32, mask_rate=0.15))
    )
    counts = [len(batch.positions) for step in plain for batch in step.batches]
    assert len(set(counts)) > 5
    assert {len(batch.positions) for step in static for batch in step.batches} == {44}
    for one, other in zip(plain, static, strict=True):
        assert one.n_masked == other.n_masked
        for batch, padded in zip(one.batches, other.batches, strict=True):
            n = len(batch.positions)
            assert torch.equal(padded.positions[:n], batch.positions)
            assert (padded.labels.flatten()[padded.positions[n:]] == IGNORE).all()
            assert len(set(padded.positions.tolist())) == 44


def test_a_gpu_gets_widths_that_suit_its_kernels_and_the_same_masks():
    """A multiple of 8, unless the rows may not be as long as that."""
    rows = rows_of(*[11, 5, 13, 29] * 8)
    collator = Collator(ToyTokenizer(), mask_rates=(0.4, 0.4))
    for indices, width in (([0, 1], 16), ([4, 2], 16), ([3, 5], 29)):
        one = collator(rows, np.array(indices))
        other = Layout(29, aligned=True)(one)
        columns = one.labels.shape[1]
        assert other.labels.shape == (2, width)
        for narrow, wide in zip(one[:3], other[:3], strict=True):
            assert torch.equal(wide[:, :columns], narrow)
        assert (other.labels[:, columns:] == IGNORE).all() and len(one.positions)
        assert not other.attention_mask[:, columns:].any()
        labels = (batch.labels.flatten()[batch.positions] for batch in (one, other))
        assert torch.equal(*labels)


def test_each_epoch_sees_every_row_once_in_a_new_order():
    steps = list(loader(rows_of(*[2] * 7), batch_size=3).steps(0, 6))
    seen = [originals(step.batches[0])[:, 0] for step in steps]
    assert [len(rows) for rows in seen] == [3, 3, 1, 3, 3, 1]  # the short last batch is kept
    first, second = torch.cat(seen[:3]).tolist(), torch.cat(seen[3:]).tolist()
    assert sorted(first) == sorted(second) == [10, 20, 30, 40, 50, 60, 70]
    assert first != second


@pytest.mark.parametrize("batch_size, accumulate", [(16, 2), (8, 4), (4, 8), (5, 7)])
def test_a_step_is_the_same_however_it_is_split(batch_size, accumulate):
    """Same rows, masks and number of masked tokens, in the short last step too."""
    rows = rows_of(*range(2, 62))
    whole = loader(rows, batch_size=batch_size * accumulate, accumulate=1)
    parts = loader(rows, batch_size=batch_size, accumulate=accumulate)
    for one, many in zip(whole.steps(0, 4), parts.steps(0, 4), strict=True):
        for field in ("input_ids", "attention_mask", "labels"):
            joined = torch.cat([getattr(batch, field) for batch in many.batches])
            assert torch.equal(getattr(one.batches[0], field), joined)
        assert one.n_masked == many.n_masked == sum(len(b.positions) for b in many.batches)


def test_a_step_number_and_the_mask_generator_are_the_whole_position():
    settings = {"batch_size": 3, "mask_rates": (0.5, 0.5)}
    whole = loader(rows_of(*range(3, 14)), **settings)
    expected = list(whole.steps(0, 9))
    before = loader(rows_of(*range(3, 14)), **settings)
    list(before.steps(0, 5))
    after = loader(rows_of(*range(3, 14)), **settings)
    after.collator.generator.set_state(before.collator.generator.get_state())
    for one, other in zip(expected[5:], after.steps(5, 9), strict=True):
        for mine, theirs in zip(one.batches[0][:4], other.batches[0][:4], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("whole_word", [False, True])
def test_padded_batches_equal_the_collators(whole_word):
    """The collator pads, looks special tokens up row by row, and masks."""
    tokenizer = byte_level_tokenizer()
    texts = ["Paris.", "A whale is a mammal.", "Unbelievable misunderstandings", "The heart"]
    probabilities = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if whole_word else {}
    hf_collator = DataCollatorForLanguageModeling(
        tokenizer, seed=42, mlm_probability=0.4, whole_word_mask=whole_word, **probabilities
    )
    encoding = tokenizer(texts, return_offsets_mapping=whole_word)
    spans = encoding.pop("offset_mapping", [])
    starts = [
        start != end
        for row in spans
        for (start, _), end in zip(row, [-1] + [end for _, end in row[:-1]], strict=True)
    ]
    rows = TokenRows(
        np.concatenate(encoding["input_ids"]).astype(np.uint16),
        np.cumsum([0] + [len(ids) for ids in encoding["input_ids"]]),
        np.array(starts) if whole_word else None,
    )
    collator = Collator(tokenizer, mask_rates=(0.4, 0.4), **probabilities)
    longest = max(map(len, encoding["input_ids"]))
    for _ in range(10):
        batch = collator(rows, np.arange(4))
        examples = [{"input_ids": ids} for ids in encoding["input_ids"]]
        if whole_word:  # it cannot pad offsets
            examples = [
                {
                    "input_ids": ids + [tokenizer.pad_token_id] * (longest - len(ids)),
                    "offset_mapping": row + [(0, 0)] * (longest - len(row)),
                    "special_tokens_mask": tokenizer.get_special_tokens_mask(
                        ids, already_has_special_tokens=True
                    )
                    + [1] * (longest - len(ids)),
                }
                for ids, row in zip(encoding["input_ids"], spans, strict=True)
            ]
        expected = hf_collator(examples)
        assert torch.equal(batch.input_ids, expected["input_ids"])
        assert torch.equal(batch.labels, expected["labels"])


def test_the_mask_rate_falls_linearly_over_the_run():
    """From the first step's to the last one's, and the same after a resume."""
    rows = TokenRows(np.full(40_000, 500, np.uint16), np.arange(0, 40_001, 1000))
    settings = {"mask_rates": (0.9, 0.1), "batch_size": 8}
    expected = [0.9, 0.7, 0.5, 0.3, 0.1]
    for first in (0, 3):
        steps = loader(rows, **settings).steps(first, 5)
        shares = [step.n_masked / step.n_tokens for step in steps]
        assert shares == pytest.approx(expected[first:], abs=0.03)
    (step,) = loader(rows, **settings, arrange=Layout(1000, mask_rate=0.9)).steps(4, 5)
    assert len(step.batches[0].positions) > 0.9 * 8000  # one size fits every step

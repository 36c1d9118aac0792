"""evaluate(): fixed masks, every masked token counts once, training is left as it was."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mlm_scratch.config import TUTORIAL, changed
from mlm_scratch.evaluate import evaluate, masked_batches, perplexity
from mlm_scratch.loader import Collator, TokenRows
from mlm_scratch.model import MaskedLM
from mlm_scratch.precision import Precision
from tests.support.tiny import byte_level_tokenizer, roberta

TOKENIZER = byte_level_tokenizer()
CPU = Precision(torch.device("cpu"), torch.float32)
CONFIG = changed(TUTORIAL, eval_batch_size=3, mlm_probability=0.3, eval_mlm_probability=0.3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaskedLM(roberta(TOKENIZER).train())


@pytest.fixture
def rows():
    """Eleven rows of 5 to 25 tokens: the batches differ in masked tokens."""
    lengths = np.random.default_rng(0).integers(5, 26, 11)
    tokens = np.random.default_rng(1).integers(5, len(TOKENIZER), lengths.sum())
    return TokenRows(tokens.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]))


@pytest.mark.parametrize("dense_head", [False, True])
def test_the_mean_is_over_tokens_not_batches(model, rows, dense_head):
    model.dense_head = dense_head
    result = evaluate(model, TOKENIZER, rows, CONFIG, CPU)
    collator = Collator(TOKENIZER, **CONFIG.masking.of_collator())
    losses, hits = [], []
    model.eval()
    batch = collator(rows, np.arange(11))
    logits = model.hf_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    masked = batch.labels != -100
    losses += cross_entropy(logits[masked], batch.labels[masked], reduction="none").tolist()
    hits += (logits[masked].argmax(-1) == batch.labels[masked]).tolist()
    assert result["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result["eval_accuracy"] == np.mean(hits)


@pytest.mark.parametrize("rows_at_once", [1024, 4])
def test_the_batch_size_changes_nothing_but_rounding(model, rows, monkeypatch, rows_at_once):
    """Also across the borders of what is masked together."""
    monkeypatch.setattr("mlm_scratch.evaluate.ROWS_AT_ONCE", rows_at_once)
    expected = evaluate(model, TOKENIZER, rows, changed(CONFIG, eval_batch_size=1), CPU)
    for size in (2, 3, 4, 5, 11, 64):
        result = evaluate(model, TOKENIZER, rows, changed(CONFIG, eval_batch_size=size), CPU)
        assert result == pytest.approx(expected, rel=1e-6)


def test_a_batch_is_as_wide_as_its_longest_row(rows):
    lengths = np.diff(rows.starts)
    for number, batch in enumerate(masked_batches(TOKENIZER, rows, CONFIG)):
        assert batch.labels.shape[1] == max(lengths[3 * number : 3 * number + 3])


def test_a_loss_that_no_perplexity_fits(model, rows):
    """An infinite one, not a number of 305 digits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e3
    result = evaluate(model, TOKENIZER, rows, CONFIG, CPU)
    assert 710 < result["eval_loss"] < math.inf and result["perplexity"] == math.inf
    assert perplexity(709.0) == math.exp(709) and math.isnan(perplexity(math.nan))


def test_without_masked_tokens_the_result_is_nan(model, rows):
    """Rather than a loss of 0, which would look perfect."""
    result = evaluate(model, TOKENIZER, rows, changed(CONFIG, eval_mlm_probability=1e-9), CPU)
    assert len(result) == 3 and all(map(math.isnan, result.values()))


def test_it_ignores_and_restores_the_state_of_training(model, rows):
    first = evaluate(model, TOKENIZER, rows, CONFIG, CPU)
    torch.rand(123)
    np.random.rand(5)
    state = torch.get_rng_state()
    assert evaluate(model, TOKENIZER, rows, CONFIG, CPU) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.hf_model.training
    model.eval()
    evaluate(model, TOKENIZER, rows, CONFIG, CPU)
    assert not model.training


def test_train_mode_is_restored_after_an_error(model, rows):
    rows.tokens[0] = len(TOKENIZER) + 7  # an id without an embedding
    with pytest.raises(IndexError):
        evaluate(model, TOKENIZER, rows, CONFIG, CPU)
    assert model.training


def test_another_loss_in_training_leaves_perplexity_what_it_is(model, rows):
    expected = evaluate(model, TOKENIZER, rows, CONFIG, CPU)
    smoothed = partial(cross_entropy, reduction="sum", label_smoothing=0.2)
    assert evaluate(MaskedLM(model.hf_model, smoothed), TOKENIZER, rows, CONFIG, CPU) == expected

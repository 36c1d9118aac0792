"""evaluate(): fixed masks, every masked token counted once, training left as it was."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mlm_scratch.config import TUTORIAL
from mlm_scratch.data.rows import TokenRows
from mlm_scratch.evaluate import evaluate
from mlm_scratch.loader import Collator
from mlm_scratch.model import MaskedLM
from mlm_scratch.precision import Precision
from tests.support.tiny import byte_level_tokenizer, roberta

TOKENIZER = byte_level_tokenizer()
CPU = Precision(torch.device("cpu"), torch.float32)
CONFIG = replace(TUTORIAL, eval_batch_size=3, mlm_probability=0.3)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return MaskedLM(roberta(TOKENIZER).train())


@pytest.fixture
def rows():
    """Eleven rows of 5 to 25 tokens: batches have unequally many masked ones."""
    lengths = np.random.default_rng(0).integers(5, 26, 11)
    tokens = np.random.default_rng(1).integers(5, len(TOKENIZER), lengths.sum())
    return TokenRows(tokens.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]))


@pytest.mark.parametrize("dense_head", [False, True])
def test_the_mean_is_over_tokens_not_batches(net, rows, dense_head):
    result = evaluate(net, TOKENIZER, rows, replace(CONFIG, dense_head=dense_head), CPU)
    collator = Collator(TOKENIZER, CONFIG)
    losses, hits = [], []
    net.eval()
    for start in range(0, 11, 3):
        batch = collator(rows, np.arange(start, min(start + 3, 11)))
        logits = net.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        chosen = batch.labels != -100
        losses += cross_entropy(logits[chosen], batch.labels[chosen], reduction="none").tolist()
        hits += (logits[chosen].argmax(-1) == batch.labels[chosen]).tolist()
    assert result["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result["eval_accuracy"] == np.mean(hits)


def test_without_a_masked_token_there_is_no_result(net, rows):
    """Rather than a loss of 0, which would look perfect."""
    result = evaluate(net, TOKENIZER, rows, replace(CONFIG, mlm_probability=1e-9), CPU)
    assert len(result) == 3 and all(map(math.isnan, result.values()))


def test_it_is_the_same_whatever_training_drew_and_leaves_training_alone(net, rows):
    first = evaluate(net, TOKENIZER, rows, CONFIG, CPU)
    torch.rand(123)
    np.random.rand(5)
    state = torch.get_rng_state()
    assert evaluate(net, TOKENIZER, rows, CONFIG, CPU) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and net.model.training
    net.eval()
    evaluate(net, TOKENIZER, rows, CONFIG, CPU)
    assert not net.training


def test_train_mode_comes_back_after_an_error(net, rows):
    rows.tokens[0] = len(TOKENIZER) + 7  # an id without an embedding
    with pytest.raises(IndexError):
        evaluate(net, TOKENIZER, rows, CONFIG, CPU)
    assert net.training

"""The head on masked positions against the dense head."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from mlm_scratch.hf.checks import in_eval_mode
from mlm_scratch.model import MaskedLM
from tests.support.tiny import batch_of, bert_config


def batch():
    """Rows of 9 and 6 tokens, padded; 5 masked positions."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 50, (2, 9), generator=generator)
    attention_mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    labels = torch.full((2, 9), -100)
    for row, column in ((0, 1), (0, 2), (0, 8), (1, 0), (1, 5)):
        labels[row, column] = 10 * row + column
    return input_ids, attention_mask, labels


def test_the_head_runs_on_masked_positions_only():
    model = AutoModelForMaskedLM.from_config(bert_config())
    seen = []
    model.cls.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    masked_lm = MaskedLM(model)
    for masked_lm.dense_head in (False, True):
        masked_lm(batch_of(*batch()))
    assert seen == [(1, 5, 32), (2, 9, 32)]


def test_a_batch_without_masked_tokens_has_loss_0_and_a_gradient_of_0():
    model = AutoModelForMaskedLM.from_config(bert_config())
    input_ids, attention_mask, labels = batch()
    labels.fill_(-100)
    empty = batch_of(input_ids, attention_mask, labels)
    loss_sum = MaskedLM(model)(empty)
    assert loss_sum.item() == 0
    loss_sum.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_hf_model_still_returns_all_logits():
    """Also when wrapped, and after a sparse forward pass."""
    model = AutoModelForMaskedLM.from_config(bert_config()).eval()
    input_ids, attention_mask, labels = batch()
    before = model(input_ids=input_ids, attention_mask=attention_mask).logits
    MaskedLM(model)(batch_of(input_ids, attention_mask, labels))
    assert torch.equal(model(input_ids=input_ids, attention_mask=attention_mask).logits, before)


def test_the_sum_is_taken_in_fp32_under_autocast():
    model = AutoModelForMaskedLM.from_config(bert_config()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum = MaskedLM(model)(batch_of(*batch()))
        input_ids, attention_mask, labels = batch()
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    assert loss_sum.dtype == torch.float32
    expected = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss_sum.item() == pytest.approx(expected.item(), rel=0.02)  # bf16 has 3 digits


def test_half_precision_logits_are_summed_in_fp32():
    """Without autocast, which runs cross_entropy in fp32 anyway."""
    model = AutoModelForMaskedLM.from_config(bert_config()).to(torch.bfloat16)
    assert MaskedLM(model)(batch_of(*batch())).dtype == torch.float32


def test_a_wrapped_model_keeps_its_mode():
    """Or the next evaluation would leave a model in train mode that was in eval mode."""
    model = AutoModelForMaskedLM.from_config(bert_config())
    for training in (True, False):
        masked_lm = MaskedLM(model.train(training))
        with in_eval_mode(masked_lm):
            assert not model.training
        assert masked_lm.training == model.training == training

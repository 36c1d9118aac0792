"""The sum of cross-entropies in chunks against torch's own."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mlm_scratch.speed.cross_entropy import cross_entropy_sum


def logits_and_labels(dtype=torch.float32):
    """(50, 30) and (50,), 20 of which are -100."""
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(50, 30, generator=generator)
    labels = torch.randint(30, (50,), generator=generator)
    labels[torch.randperm(50, generator=generator)[:20]] = -100
    return logits.to(dtype).requires_grad_(), labels


def sum_and_gradient(function, logits, labels):
    loss = function(logits, labels)
    (gradient,) = torch.autograd.grad(3 * loss, logits)  # as a loss scale does
    return loss.detach(), gradient


def whole(logits, labels):
    return cross_entropy(logits.float(), labels, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_sum_and_its_gradient_are_torchs_own(dtype, monkeypatch):
    expected = sum_and_gradient(whole, *logits_and_labels(dtype))
    got = sum_and_gradient(cross_entropy_sum, *logits_and_labels(dtype))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    monkeypatch.setattr("mlm_scratch.speed.cross_entropy.LOGITS_AT_ONCE", 7 * 30)  # 8 chunks
    got = sum_and_gradient(cross_entropy_sum, *logits_and_labels(dtype))
    torch.testing.assert_close(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_only_the_logits_are_kept_for_the_backward_pass():
    """Not a copy in fp32, nor the log-softmax."""
    logits, labels = logits_and_labels(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy_sum(logits, labels)
    assert [tensor.data_ptr() for tensor in kept] == [logits.data_ptr(), labels.data_ptr()]


@pytest.mark.parametrize("rows", [0, 4])
def test_without_labels_the_sum_is_0_and_so_is_the_gradient(rows):
    logits = torch.randn(rows, 5, requires_grad=True)
    loss, gradient = sum_and_gradient(cross_entropy_sum, logits, torch.full((rows,), -100))
    assert loss.item() == 0 and gradient.shape == (rows, 5) and not gradient.any()

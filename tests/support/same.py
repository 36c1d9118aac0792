"""Comparisons of two runs: bit for bit, or up to the rounding of another order of sums."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from mlm_scratch.report.metrics import METRICS, read_metrics
from mlm_scratch.util.runs import MODEL, STATE, checkpoints, find_fault

WEIGHTS = "model.safetensors"


def assert_same(one: object, other: object) -> None:
    """Assert that two nested containers of tensors and values are equal bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs left the same metrics, checkpoints and model, bit for bit."""
    assert (one / METRICS).read_text() == (other / METRICS).read_text()
    assert [path.name for path in checkpoints(one)] == [path.name for path in checkpoints(other)]
    names = [MODEL, *(path.name for path in checkpoints(one))]
    for a, b in ((one / name, other / name) for name in names):
        assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
        assert_same(load_file(a / WEIGHTS), load_file(b / WEIGHTS))
        if a.name != MODEL:
            assert find_fault(a) is find_fault(b) is None
            states = [torch.load(path / STATE) for path in (a, b)]
            assert_same(*states)
    assert (other / "loss.png").is_file()


def assert_same_curve(one: Path, other: Path) -> None:
    """Assert that losses and gradient norms agree to 1e-5, and that the final weights agree."""
    lines, other_lines = read_metrics(one), read_metrics(other)
    assert len(lines) == len(other_lines) > 0
    for line, other_line in zip(lines, other_lines, strict=True):
        fills, other_fills = line.pop("watch", []), other_line.pop("watch", [])
        assert line == pytest.approx(other_line, rel=1e-5)
        for fill, other_fill in zip(fills, other_fills, strict=True):
            assert fill["text"] == other_fill["text"]
            assert fill["answer_p"] == pytest.approx(other_fill["answer_p"], rel=1e-4)
    weights, other_weights = (load_file(run / MODEL / WEIGHTS) for run in (one, other))
    for name in weights:
        if not name.endswith("key.bias"):  # softmax cancels it: its gradient is rounding alone
            assert_close(weights[name], other_weights[name], rtol=1e-4, atol=1e-5)

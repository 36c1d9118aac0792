"""Two runs, or two nests of tensors, compared bit for bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from mlm_scratch.run.checkpoint import checkpoints, find_fault
from mlm_scratch.run.metrics import METRICS


def assert_same(one: object, other: object) -> None:
    """Raise AssertionError unless two nests of tensors and values are equal bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    """Raise AssertionError unless two runs left the same behind, bit for bit."""
    assert (one / METRICS).read_text() == (other / METRICS).read_text()
    assert [path.name for path in checkpoints(one)] == [path.name for path in checkpoints(other)]
    names = ["model", *(path.name for path in checkpoints(one))]
    for a, b in ((one / name, other / name) for name in names):
        assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
        assert_same(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))
        if a.name != "model":
            assert find_fault(a) is find_fault(b) is None
            states = [torch.load(path / "training_state.pt") for path in (a, b)]
            assert_same(*states)
    assert (other / "loss.png").is_file()

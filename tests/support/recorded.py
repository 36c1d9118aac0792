"""A CUDA graph without CUDA: the operators of a piece of code, to be computed again.

As a graph does, a replay reads and writes the tensors that the code used, where they lie, and takes
every other argument as it was when the code was recorded. No Python is run again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded(TorchDispatchMode):
    """Records what runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute, and note the operator, its arguments and its result."""
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Compute all of it again, into the same memory."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not share_memory(old, new):
                    old.copy_(new)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both are views of the same memory: of an argument that was changed, for example."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()

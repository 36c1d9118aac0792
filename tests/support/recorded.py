"""A CUDA graph without CUDA: the operators of a piece of code, to be computed again.

As a graph does, a replay reads and writes the tensors that the code used, where they lie, takes
every other argument as it was when the code was recorded, and draws new random numbers. No Python
is run again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode):
    """Records what runs within it; at its end, all memory is as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        self.before: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # memory and its copy
        self.made: set[int] = set()  # memory that was not there before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute, and note the operator, its arguments and its result."""
        kwargs = kwargs or {}
        for memory in (x.untyped_storage() for x in tensors_in((args, kwargs))):
            if memory.data_ptr() not in self.made | self.before.keys():
                self.before[memory.data_ptr()] = memory, memory.clone()
        result = func(*args, **kwargs)
        self.made |= {address(x) for x in tensors_in(result)} - self.before.keys()
        self.calls.append((func, args, kwargs, result))
        return result

    def __enter__(self) -> "Recorded":
        """Begin to record."""
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Undo what was computed."""
        super().__exit__(*error)
        torch.set_rng_state(self.random)
        for memory, copy in self.before.values():
            memory.copy_(copy)

    @torch.no_grad()
    def replay(self) -> None:
        """Compute all of it again, into the same memory."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors_in(result), tensors_in(again), strict=True):
                if address(old) != address(new):  # else both are views of an argument
                    old.copy_(new)


# An operator's arguments and results nest in few ways: torch's functions for trees of any kind took
# a third of the stand-in's time.


def leaves(tree: Any) -> Iterator[Any]:
    """Yield what lists, tuples and dictionaries hold."""
    if isinstance(tree, list | tuple | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)
    else:
        yield tree


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with each leaf replaced."""
    if isinstance(tree, dict):
        return {name: mapped(function, branch) for name, branch in tree.items()}
    if isinstance(tree, list | tuple):
        branches = [mapped(function, branch) for branch in tree]
        return branches if isinstance(tree, list) else tuple(branches)
    return function(tree)


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors among arguments or results."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    """Return where the memory of a tensor begins; that of its views, too."""
    return tensor.untyped_storage().data_ptr()

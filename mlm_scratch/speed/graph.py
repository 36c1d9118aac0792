"""A whole optimizer step as one CUDA graph: captured once, then replayed with a single launch.

With few rows a GPU waits for Python: an H200 is busy for 4 ms of a step of 8 x 128 tokens, and
Python needs 25 to 30 to launch its 600 kernels. A graph holds them all, up to those of AdamW.

A replay runs no Python. It reads and writes the tensors that the captured step did, where they lie:
weights, moments, the rate, and batches of the graph's own, into which each step's are copied.
So all steps must have one shape (`steps_are_alike`). Gradients live in the graph's memory only.
Off: --no-graph.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mlm_scratch.config import TrainConfig
from mlm_scratch.loader import Batch
from mlm_scratch.loop import compute_step
from mlm_scratch.parallel.ranks import Ranks
from mlm_scratch.precision import Precision
from mlm_scratch.util.errors import first_line

WARM_UP = 3  # steps of a shape before: AdamW's moments, fp16's scale, compiled code must be there


def steps_are_alike(config: TrainConfig, precision: Precision, ranks: Ranks) -> bool:
    """Whether the steps of a run have one shape, on a single CUDA GPU.

    Rows of `--grouping blocks` have one length; Layout.rows fills up a short batch. (A last step of
    fewer batches is not replayed.) Gradient checkpointing reads the CUDA generator's state, which
    cannot be captured.
    """
    on_gpu = precision.device.type == "cuda" and ranks.size == 1
    blocks = config.text.grouping == "blocks"
    return on_gpu and blocks and not config.machine.gradient_checkpointing


def make_capturable(optimizer: Optimizer, device: torch.device) -> None:
    """Put the rate into a tensor on the GPU: as a Python number it would stay the captured one.

    With `capturable`, AdamW counts its steps there, too. Done for every run on a GPU, whose digits
    depend on it: a Python number has more of them.
    """
    for group in optimizer.param_groups:
        rate = torch.full((), group["lr"], device=device)  # ()
        group |= {"initial_lr": group["lr"], "lr": rate, "capturable": True}


class StepGraph:
    """Computes steps as `compute_step` does: the first ones by it, the later ones as replays."""

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.computed: Counter[tuple[torch.Size, ...]] = Counter()  # steps, by their shapes
        self.shapes: tuple[torch.Size, ...] = ()  # of the step that was captured, or could not be
        self.inputs: list[Tensor] = []  # that the graph reads: its batches, and n_masked
        self.results: tuple[Tensor, Tensor]  # that it writes: loss and norm

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        batches: list[Batch],
        n_masked: Tensor,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Compute a step: the arguments and results are those of `compute_step`.

        All but `batches` and `n_masked` have to be the same in every step.
        """

        def compute(batches: list[Batch], n_masked: Tensor) -> tuple[Tensor, Tensor]:
            """Compute a step on these tensors."""
            return compute_step(model, optimizer, scaler, batches, n_masked, *options)

        inputs = tensors_of(batches, n_masked)
        shapes = tuple(x.shape for x in inputs)
        if not self.shapes and self.computed[shapes] == WARM_UP:
            self.shapes = shapes  # not tried again
            self._capture(compute, optimizer, scaler, batches, n_masked)
        if self.graph is None or shapes != self.shapes:
            self.computed[shapes] += 1
            return compute(batches, n_masked)
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        loss, grad_norm = self.results
        return loss.clone(), grad_norm.clone()  # the next replay writes into the same memory

    def _capture(
        self,
        compute: Callable[[list[Batch], Tensor], tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        batches: list[Batch],
        n_masked: Tensor,
    ) -> None:
        """Capture a step, without executing it; print a line where that is not possible."""
        held = [Batch._make(x if x is None else x.clone() for x in batch) for batch in batches]
        n_held, graph = n_masked.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        dropout = torch.cuda.default_generators[n_masked.device.index]
        dropout_before = dropout.clone_state()
        reason = ""
        try:
            # Other threads may go on using the GPU: a checkpoint is written in the background.
            with (
                nothing_drawn_on_the_cpu(),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                try:
                    results = compute(held, n_held)
                except Exception as error:  # the model makes the CPU wait, for example
                    reason = first_line(error)  # the end of the capture may raise another error
                    raise
        except Exception as error:
            torch.cuda.set_stream(stream)
            dropout.graphsafe_set_state(dropout_before)  # else it stays in capture mode
            optimizer.zero_grad()
            scaler.update(scaler.get_scale())  # else its gradients stay "unscaled already"
            reason = reason or first_line(error)
            print(f"warning: steps are not replayed as a CUDA graph: {reason}", file=sys.stderr)
        else:
            self.graph, self.inputs, self.results = graph, tensors_of(held, n_held), results


@contextmanager
def nothing_drawn_on_the_cpu() -> Iterator[None]:
    """Raise RuntimeError if random numbers were drawn there: each replay would use the same.

    LayerDrop draws some. Looks at the global generators of Python, numpy and torch, which are
    afterwards as before. A model that changes in other ways from step to step needs --no-graph.
    """
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
        changed = random.getstate() != python or str(np.random.get_state()) != str(arrays)
        changed |= not torch.equal(torch.get_rng_state(), tensors)
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(tensors)
    if changed:
        raise RuntimeError("the model draws random numbers on the CPU")


def tensors_of(batches: list[Batch], n_masked: Tensor) -> list[Tensor]:
    """List all tensors that are new in a step."""
    return [x for batch in batches for x in batch if x is not None] + [n_masked]

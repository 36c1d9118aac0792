"""The explicit training loop with AMP: what `Trainer` does for masked-language modelling.

AMP, automatic mixed precision: `autocast` runs matrix products in fp16 or bf16 and leaves the
weights in fp32; for fp16, a GradScaler scales the loss up. In fp32 both do nothing.

`train_step` is one optimizer step, `run_steps` the loop around it. It yields after each step, so
logging, evaluation and checkpoints belong to whoever iterates over it:

    steps = loader.steps(0, total_steps)
    for done in run_steps(steps, model, optimizer, scheduler, scaler):
        print(done.loss.item(), done.learning_rate)
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .loader import Batch, Step
from .optim import next_rate


def compute_step(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batches: list[Batch],
    n_masked: Tensor,
    autocast: Callable[[], AbstractContextManager],
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of all batches, and update the weights once.

    Everything here runs on the device. Nothing that changes from step to step is a Python number,
    so that speed/graph.py can record it and replay it with other data. `n_masked` is a tensor, ():
    the masked tokens of the whole step. The other arguments and the results: see `train_step`.
    """
    loss = torch.zeros_like(n_masked)  # ()
    for batch in batches:
        # An attribute for DDP: all-reduce the gradients once per step, in the last backward.
        model.require_backward_grad_sync = batch is batches[-1]  # type: ignore[assignment]
        with autocast():
            loss_sum = model(batch)  # () nats
        # Divided by the masked tokens of the whole step, not of this batch: then the gradients add
        # up to those of one large batch, however it is split.
        batch_loss = loss_sum / n_masked  # ()
        scaler.scale(batch_loss).backward()  # scaled: small gradients would underflow in fp16
        loss += batch_loss.detach()
    scaler.unscale_(optimizer)  # undo the scaling before measuring the norm
    grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm)  # ()
    scaler.step(optimizer)  # skipped if any gradient is inf or NaN
    scaler.update()  # halves the scale after a skipped step, doubles it after 2,000 others
    optimizer.zero_grad()
    return loss, grad_norm


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    scaler: torch.amp.GradScaler,
    step: Step,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_grad_norm: float = 1.0,
    compute: Callable[..., tuple[Tensor, Tensor]] = compute_step,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step, and move the schedule on: what the CPU decides about a step.

    Args:
        model: a MaskedLM; or one wrapped in DistributedDataParallel (DDP), whose backward sums the
            gradients over all processes.
        optimizer: updates the weights of the model.
        scheduler: sets the optimizer's learning rate.
        scaler: scales the loss of fp16; disabled for other precisions.
        step: the batches of this process, and the number of masked tokens of all processes.
        autocast: returns the context of a forward pass.
        max_grad_norm: the gradients are clipped to this norm.
        compute: does what `compute_step` does; speed/graph.py replays it as a CUDA graph.

    Returns:
        (loss, grad_norm), () each, on the device: reading them makes the CPU wait. The loss, in
        nats per masked token, counts this process's rows only: those of all processes add up. The
        norm is measured before clipping.
    """
    one = torch.ones((), device=step.batches[0].labels.device)  # ()
    if step.n_masked == 0:  # gradients would be 0, but AdamW would still apply momentum and decay
        return torch.zeros_like(one), torch.zeros_like(one)
    scale_before = scaler.scale(one)  # () on the device: get_scale() would make the CPU wait
    n_masked = one * step.n_masked  # ()
    loss, grad_norm = compute(
        model, optimizer, scaler, step.batches, n_masked, autocast, max_grad_norm
    )
    # A step that the scaler skipped does not count for the schedule. In fp16 the CPU waits here.
    if not scaler.is_enabled() or scaler.scale(one) >= scale_before:
        scheduler.step()
    return loss, grad_norm


# ---- The loop ------------------------------------------------------------------------------------


class Done(NamedTuple):
    """What an optimizer step has done."""

    step: Step
    learning_rate: float
    loss: Tensor  # () nats per masked token, on the device
    grad_norm: Tensor  # () before clipping, on the device


def run_steps(
    steps: Iterable[Step],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    scaler: torch.amp.GradScaler,
    *,
    train_step: Callable[..., tuple[Tensor, Tensor]] = train_step,
    **options: Any,
) -> Iterator[Done]:
    """Run optimizer steps, and yield what each has done.

    Pass another `train_step` to replace the step. `options` are its keyword arguments.
    """
    for step in steps:
        learning_rate = next_rate(scheduler)  # before train_step advances it
        loss, grad_norm = train_step(model, optimizer, scheduler, scaler, step, **options)
        yield Done(step, learning_rate, loss, grad_norm)

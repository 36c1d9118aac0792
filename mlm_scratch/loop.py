"""The explicit training loop with AMP: what `Trainer` does for masked-language modelling.

AMP, automatic mixed precision: `autocast` runs matrix products in fp16 or bf16 and leaves the
weights in fp32; for fp16, a GradScaler scales the loss up. In fp32 both do nothing.

`train_step` is one optimizer step, `run_steps` the loop around it. Both take t, the run in memory:
a Training (run/state.py), built in run/build.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mlm_scratch.loader import Step

if TYPE_CHECKING:  # for annotations only: run/ imports this file
    from mlm_scratch.run.metrics import NoReport
    from mlm_scratch.run.signals import StopRequest
    from mlm_scratch.run.state import Training


def train_step(t: "Training", step: Step) -> tuple[Tensor, Tensor]:
    """Compute the gradients of one optimizer step, and update the weights once.

    t.model is a MaskedLM. t.ddp_model is what runs: the same, or with several ranks (processes)
    wrapped in DistributedDataParallel (DDP), which sums their gradients.

    Returns:
        (loss, grad_norm), () each, still on the device. The loss, in nats per masked token, counts
        this rank's rows only: those of the ranks add up. The norm is measured before clipping.
    """
    loss = torch.zeros((), device=t.precision.device)  # ()
    for batch in step.batches:
        # DDP: all-reduce gradients once per step, in the last backward.
        t.ddp_model.require_backward_grad_sync = batch is step.batches[-1]
        with t.precision.autocast():
            loss_sum = t.ddp_model(batch)  # () nats
        # Divided by the masked tokens of the whole step, not of this batch: then the gradients add
        # up to those of one large batch, however it is split.
        batch_loss = loss_sum / max(step.n_masked, 1)  # ()
        t.scaler.scale(batch_loss).backward()  # scaled: small gradients would underflow in fp16
        loss += batch_loss.detach()
    if step.n_masked == 0:  # gradients are 0, but AdamW would still apply momentum and decay
        t.optimizer.zero_grad()
        return loss, torch.zeros_like(loss)

    t.scaler.unscale_(t.optimizer)  # undo the scaling before measuring the norm
    grad_norm = clip_grad_norm_(t.model.parameters(), t.config.max_grad_norm)  # ()
    t.scaler.step(t.optimizer)  # skipped if any gradient is inf or NaN
    t.scaler.update()  # halves the scale after a skipped step, doubles it after 2,000 good ones
    if not t.scaler.skipped_step():  # in fp16 the CPU waits for the GPU here
        t.scheduler.step()  # a skipped step does not count for the schedule
    t.optimizer.zero_grad()
    return loss, grad_norm


def run_steps(t: "Training", report: "NoReport", stop: "StopRequest") -> None:
    """Run the remaining optimizer steps, or up to the one after which the run is to end.

    Args:
        t: the run in memory.
        report: logs the metrics; that of a rank other than 0 ignores them (run/metrics.py).
        stop: remembers a stop signal (run/signals.py).
    """
    for step in t.loader.steps(t.steps_done, t.total_steps):
        learning_rate = float(t.scheduler.get_last_lr()[0])  # before train_step advances it
        loss, grad_norm = train_step(t, step)
        t.steps_done += 1
        t.losses.add(loss, step.n_masked)
        report.advance(step)

        # ---- Once in a while
        if t.steps_done % t.config.log_every == 0:
            report.log(t.steps_done, t.losses.take_mean(), learning_rate, grad_norm.item())
        t.losses.stop_if_diverged(t.steps_done)
        if t.evaluate_and_save(report, stop):
            return

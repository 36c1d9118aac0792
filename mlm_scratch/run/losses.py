"""The losses of a run, summed on the device."""

from typing import Any

import torch
from torch import Tensor

from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import Precision
from mlm_scratch.util.errors import UserError

MAX_NONFINITE_STEPS = 10  # after 10 non-finite losses in a row the weights are beyond repair


class LossMeter:
    """Sums of the losses of a run, on the device: reading one makes the CPU wait for the GPU."""

    def __init__(self, precision: Precision, log_every: int, ranks: Ranks = ALONE):
        self.precision, self.ranks = precision, ranks
        self.check_every = min(log_every, MAX_NONFINITE_STEPS)
        self.sum = torch.zeros((), device=precision.device)  # () losses since the last log
        self.steps = 0  # since the last log, those with masked tokens
        self.nonfinite = torch.zeros_like(self.sum, dtype=torch.int64)  # () steps of the run
        self.nonfinite_in_a_row = torch.zeros_like(self.nonfinite)  # () up to the last step

    def add(self, loss: Tensor, n_masked: int) -> None:
        """Add the loss of a step, (), this rank's part of it, without reading it."""
        self.ranks.all_reduce_sum(loss)
        self.steps += n_masked > 0
        self.sum += loss
        nonfinite = ~loss.isfinite()  # ()
        self.nonfinite += nonfinite
        self.nonfinite_in_a_row += nonfinite
        self.nonfinite_in_a_row *= nonfinite

    def take_mean(self) -> float:
        """Return the mean loss since the last log; synchronizes with the GPU, once per log_every.

        0 if no step had a masked token.
        """
        loss = self.sum.item() / max(self.steps, 1)
        self.sum.zero_()
        self.steps = 0
        return loss

    def stop_if_diverged(self, step: int, total_steps: int) -> None:
        """Raise UserError after MAX_NONFINITE_STEPS non-finite losses in a row, or half of the run.

        Looks only every `check_every` steps and at the end, since reading synchronizes with the
        GPU.
        """
        if step % self.check_every > 0 and step < total_steps:
            return
        limit = min(MAX_NONFINITE_STEPS, (total_steps + 1) // 2)
        if (nonfinite := self.nonfinite_in_a_row.item()) >= limit:
            raise UserError(
                f"the loss was NaN or infinite in the last {nonfinite} steps, up to step {step}; "
                f"earlier checkpoints are kept: {self.advice()}"
            )

    def advice(self) -> str:
        """Return what to do about a loss that is NaN or infinite."""
        if self.precision.dtype == torch.float16:
            return "begin a new run with --precision bf16 or fp32 instead of fp16, or a lower --lr"
        return "begin a new run with a lower --lr or more --warmup-steps"

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {
            "steps_since_log": self.steps,
            "loss_since_log": self.sum,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "nonfinite": self.nonfinite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums that `state_dict` returned."""
        self.steps = state["steps_since_log"]
        self.sum.copy_(state["loss_since_log"])
        self.nonfinite_in_a_row.copy_(state["nonfinite_in_a_row"])
        self.nonfinite.copy_(state["nonfinite"])

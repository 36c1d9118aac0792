"""How much of a GPU a run uses: the FLOP of its steps, and the rate of the GPU's data sheet.

MFU, model FLOP utilization, is the one per second divided by the other. Only what a step cannot do
without counts: what runs on masked positions alone, no layer computed again; but padding does.
"""

import math
import re
from contextlib import suppress

import torch
from torch import Tensor, nn

from mlm_scratch.hf.checks import REFUSALS, copy_with_the_same_weights, in_eval_mode
from mlm_scratch.loader import Step
from mlm_scratch.model import MaskedLM
from mlm_scratch.precision import Precision

# Dense FLOP/s of the data sheets, (bf16 and fp16, TF32), by what CUDA calls the GPU.
PEAKS = {
    r"H100 80GB HBM3$|H200$": (989e12, 495e12),
    r"A100": (312e12, 156e12),
    r"L4$": (121e12, 60e12),
    r"RTX 4090$": (165e12, 82.6e12),
}


class StepFlops:
    """Counts the FLOP of training steps of a model.

    6 per weight and position (2 forward, 4 backward) in the encoder's matrices, the attention
    products, and the head. What gradient checkpointing computes again is left out.
    """

    def __init__(self, model: MaskedLM):
        config = model.hf_model.config
        self.all, self.gathered = weights_by_positions(model)
        self.attention = 2 * config.num_hidden_layers * config.hidden_size
        self.gathered += config.hidden_size * (config.hidden_size + config.vocab_size)

    def count(self, positions: int, width: int, gathered: int) -> float:
        """Count those of `positions` in rows of `width`, of which the head sees those gathered."""
        encoder = positions * (self.all + width * self.attention)
        return 6.0 * (encoder + gathered * self.gathered)


def weights_by_positions(model: MaskedLM) -> tuple[int, int]:
    """Count the encoder's weights that multiply all positions, and those after the gathering."""
    tried = copy_with_the_same_weights(model)
    counts = [0, 0]

    def note(linear: nn.Linear, inputs: tuple, output: Tensor) -> None:
        """Add the weights of a product with 4 positions or with the gathered one."""
        counts[output.shape[:-1].numel() == 1] += linear.weight.numel()

    for part in tried.hf_model.base_model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(note)
    ids = torch.zeros((1, 4), dtype=torch.int64, device=model.hf_model.device)  # (B, T)
    first = torch.zeros(1, dtype=torch.int64, device=ids.device)  # (N,)
    with torch.no_grad(), in_eval_mode(tried):  # dropout would draw numbers that are the run's
        tried.logits(ids, None, None if model.dense_head else first)
    return counts[0], counts[1]


class Utilization:
    """Counts this rank's FLOP, where the peak of its device and the shape of its model are known.

    Attributes:
        known: whether they are.
    """

    def __init__(self, model: MaskedLM, precision: Precision):
        self.dense_head, self.peak = model.dense_head, peak_rate(precision) or math.inf
        self.flops = None
        if self.peak < math.inf:
            with suppress(*REFUSALS):  # an unusual config
                self.flops = StepFlops(model)
        self.known = self.flops is not None

    def seconds_at_peak(self, step: Step) -> float:
        """Return the time that a step would take at the device's peak; 0 if that is not known."""
        seconds = 0.0
        if self.flops is None:
            return seconds
        for batch in step.batches:
            positions, width = batch.labels.numel(), batch.labels.shape[1]
            gathered = positions if self.dense_head else len(batch.positions)
            seconds += self.flops.count(positions, width, gathered) / self.peak
        return seconds


def peak_rate(precision: Precision) -> float | None:
    """Return the FLOP/s of the GPU's data sheet, if it is known."""
    if precision.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(precision.device)
    for pattern, (half, tf32) in PEAKS.items():
        if re.search(pattern, name):
            return tf32 if precision.dtype == torch.float32 else half
    return None

"""How much of a GPU a run uses: the FLOP of its steps, and the rate of the GPU's data sheet.

MFU, model FLOP utilization, is the one per second divided by the other. Only what a step cannot do
without counts: the head on masked positions alone, no layer computed again; but padding does.
"""

import math
import re

import torch
from transformers import PreTrainedModel

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
    products, and the head where it runs. What gradient checkpointing computes again is left out.
    """

    def __init__(self, model: PreTrainedModel):
        linear = (part for part in model.base_model.modules() if isinstance(part, torch.nn.Linear))
        self.matrices = sum(part.weight.numel() for part in linear)
        self.attention = 2 * model.config.num_hidden_layers * model.config.hidden_size
        self.head = model.config.hidden_size * (model.config.hidden_size + model.config.vocab_size)

    def count(self, positions: int, width: int, head_positions: int) -> float:
        """Count those of `positions` in rows of `width`, of which the head sees some."""
        encoder = positions * (self.matrices + width * self.attention)
        return 6.0 * (encoder + head_positions * self.head)


class Utilization:
    """Counts this rank's FLOP, where the peak of its device and the shape of its model are known.

    Attributes:
        known: whether they are.
    """

    def __init__(self, model: MaskedLM, precision: Precision):
        self.dense_head, self.peak = model.dense_head, peak_rate(precision) or math.inf
        shares_layers = hasattr(model.hf_model.config, "num_hidden_groups")  # as ALBERT does
        self.known = self.peak < math.inf and not shares_layers
        try:
            self.flops = StepFlops(model.hf_model)
        except AttributeError:  # an unusual config
            self.known = False

    def seconds_at_peak(self, step: Step) -> float:
        """Return the time that a step would take at the device's peak; 0 if that is not known."""
        seconds = 0.0
        for batch in step.batches if self.known else ():
            positions, width = batch.labels.numel(), batch.labels.shape[1]
            head_positions = positions if self.dense_head else len(batch.positions)
            seconds += self.flops.count(positions, width, head_positions) / self.peak
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

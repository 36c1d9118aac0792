"""The optimizer and the schedule: AdamW, and a learning rate that rises and falls.

Trainer builds both behind the scenes. Each step updates the weights to

    w = w - lr * m / (sqrt(v) + eps) - lr * weight_decay * w

where m and v are running means of the gradient and of its square, divided by 1 - beta^step since
they start at 0 (AdamW: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization).
"""

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """Build AdamW with Trainer's betas and eps. Fused: one kernel updates all weights."""
    groups = parameter_groups(model, weight_decay)
    return AdamW(groups, lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters: decay weight matrices and embeddings only, not biases and norms.

    Decay pulls weights towards 0. The size of a bias or of a norm's scale says nothing about how
    complex the model's function is.

    Source: Trainer.get_decay_parameter_names.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    in_norms = {parameter for norm in norms for parameter in norm.parameters()}
    no_decay_name = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm($|\.)")
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        exempt = parameter in in_norms or no_decay_name.search(name.lower())
        (no_decay if exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def build_schedule(
    optimizer: Optimizer, share: Callable[[int], float], scheduled_steps: int = 0
) -> LambdaLR:
    """Build the schedule: it sets the rate of the next step; step() moves on to the one after.

    Args:
        optimizer: whose rate it sets.
        share: step -> share of the peak rate; see `share_of_peak`.
        scheduled_steps: steps done before, if a run is resumed; the optimizer's state is, too.
    """
    return LambdaLR(optimizer, share, scheduled_steps - 1)


def next_rate(schedule: LambdaLR) -> float:
    """Return the rate of the next step, as a number: the optimizer's may be a tensor on a GPU."""
    peak: Any = schedule.base_lrs[0]
    return peak * schedule.lr_lambdas[0](schedule.last_epoch)


def share_of_peak(
    step: int,
    total_steps: int,
    schedule: str = "linear",
    warmup_steps: int = 0,
    decay_steps: int = 0,
) -> float:
    """Return the rate of a step as a share of the peak: up from 0 in the warm-up, then down to 0.

    Down in a straight line, along half a cosine, or not at all ("constant"). "wsd" (warm-up,
    stable, decay) stays at the peak until `decay_steps` before the end and then falls along half a
    cosine: such a run can be prolonged from any step before its decay. With the others the rate of
    every step depends on the length.

    Sources: get_linear_schedule_with_warmup and the like of transformers; wsd: Hu et al. 2024,
    MiniCPM.
    """
    if step < warmup_steps:
        return step / warmup_steps
    fall = total_steps - decay_steps if schedule == "wsd" else warmup_steps  # where it begins
    if schedule == "constant" or step < fall:
        return 1.0
    if step >= total_steps:
        return 0.0
    if schedule == "linear":
        return (total_steps - step) / (total_steps - fall)
    return 0.5 * (1 + math.cos(math.pi * ((step - fall) / (total_steps - fall))))

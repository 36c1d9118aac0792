"""The optimizer and the schedule: AdamW, and a learning rate that rises and falls linearly.

Trainer builds both behind the scenes. Each step updates the weights to

    w = w - lr * m / (sqrt(v) + eps) - lr * weight_decay * w

where m and v are running means of the gradient and of its square, divided by 1 - beta^step since
they start at 0 (AdamW: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization).
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """Build AdamW with Trainer's betas and eps. Fused: one kernel updates all weights."""
    groups = parameter_groups(model, weight_decay)
    return AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


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
    """Build the schedule: it sets the rate of the next step; step() moves on to the one after."""
    return LambdaLR(optimizer, share, scheduled_steps - 1)


def linear_schedule(warmup_steps: int, total_steps: int, step: int) -> float:
    """Return the rate of a step as a share of the peak: up from 0 in the warm-up, then down to 0.

    Source: get_linear_schedule_with_warmup of transformers.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

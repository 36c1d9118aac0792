"""The learning rate over the run: the schedules beside the linear one of optim.py.

Each gives the rate of a step as a share of the peak. A wsd run (warm-up, stable, decay) can be
prolonged from any step before its decay, which the others cannot: there the rate of every step
depends on the length.
"""

import math
from collections.abc import Callable
from functools import partial

from mlm_scratch.config import TrainConfig, as_steps
from mlm_scratch.optim import linear_schedule


def rate_schedule(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return the schedule of a run: the number of a step -> its share of the peak rate."""
    warmup_steps = as_steps(config.warmup_steps, total_steps)
    decay_steps = as_steps(config.decay_steps, total_steps)
    schedules: dict[str, Callable[[int], float]] = {
        "linear": partial(linear_schedule, warmup_steps, total_steps),
        "cosine": partial(cosine_schedule, warmup_steps, total_steps),
        "constant": partial(constant_schedule, warmup_steps),
        "wsd": partial(wsd_schedule, warmup_steps, total_steps, decay_steps),
    }
    return schedules[config.schedule]


def cosine_schedule(warmup_steps: int, total_steps: int, step: int) -> float:
    """Up in the warm-up, then down to 0 along half a cosine.

    Source: get_cosine_schedule_with_warmup of transformers.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return half_cosine((step - warmup_steps) / max(1, total_steps - warmup_steps))


def constant_schedule(warmup_steps: int, step: int) -> float:
    """Up in the warm-up, then the peak.

    Source: get_constant_schedule_with_warmup of transformers.
    """
    return step / warmup_steps if step < warmup_steps else 1.0


def wsd_schedule(warmup_steps: int, total_steps: int, decay_steps: int, step: int) -> float:
    """Up in the warm-up, the peak until `decay_steps` before the end, then half a cosine to 0.

    Source: get_wsd_schedule of transformers; Hu et al. 2024, MiniCPM.
    """
    decayed = step - (total_steps - decay_steps)  # steps since the decay began
    if step < warmup_steps or decayed < 0:
        return constant_schedule(warmup_steps, step)
    return half_cosine(decayed / max(1, decay_steps)) if decayed < decay_steps else 0.0


def half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))

"""Fixed shapes for a compiled model: torch.compile makes a new graph for each new one."""

import math

import torch
from torch import Tensor


def pad_positions(is_masked: Tensor, mlm_probability: float) -> Tensor:
    """Index the masked tokens, and as many others as make their number the same every time.

    Args:
        is_masked: (B * T,) bool.
        mlm_probability: the share of tokens that are masked, on average.

    Returns:
        (N,) int64, the masked tokens first. The others have no label, so the loss ignores them.
        N is six standard deviations above the average: chance hardly ever exceeds it.
    """
    total, share = len(is_masked), mlm_probability
    count = math.ceil(total * share + 6 * math.sqrt(total * share * (1 - share)))
    count = max(count, int(is_masked.sum()))  # whole words vary more than the binomial bound
    return is_masked.to(torch.uint8).argsort(stable=True, descending=True)[:count]  # (N,)

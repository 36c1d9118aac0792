"""Shapes that suit a compiled model and a GPU's kernels.

With a fixed number of positions, --compile and graph.py need one graph per shape of input_ids. The
mask is for model.py, and the width, a multiple of 8, for attention on a GPU; its gain is not
measured.
"""

import math

import torch
from torch import Tensor


def pad_positions(is_masked: Tensor, mlm_probability: float) -> Tensor:
    """Index the masked tokens, and as many others as make their number the same every time.

    torch.compile makes a new graph for each new shape; a CUDA graph has only one.

    Args:
        is_masked: (B * T,) bool.
        mlm_probability: the share of tokens that are masked, on average.

    Returns:
        (N,) int64, the masked tokens first. The others have no label, so the loss ignores them.
        N is six standard deviations above the average: chance hardly ever exceeds it.
    """
    total, share = len(is_masked), mlm_probability
    count = math.ceil(total * share + 6 * math.sqrt(total * share * (1 - share)))
    # Whole words vary more than the binomial bound. Coarse steps: few graphs all the same.
    count += math.ceil(max(0, int(is_masked.sum()) - count) / 64) * 64
    return is_masked.to(torch.uint8).argsort(stable=True, descending=True)[:count]  # (N,)


def additive_mask(attention_mask: Tensor, packed: bool) -> Tensor:
    """(B, T), 0 at padding -> (B, 1, 1 or T, T) float, what attention adds to its scores.

    Given as (B, T), transformers looks into it on every forward pass (the CPU waits for the GPU),
    and expands it to (B, 1, T, T). Packed, each token attends to those with its own number.
    """
    keys = attention_mask[:, None, None, :]  # (B, 1, 1, T)
    hidden = keys != attention_mask[:, None, :, None] if packed else keys == 0  # (B, 1, 1 or T, T)
    lowest = torch.finfo(torch.float32).min
    return torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, lowest)


def positions_in_texts(numbers: Tensor) -> Tensor:
    """(B, T), the number of each token's text in its row -> (B, T) its position in that text."""
    starts = torch.ones_like(numbers, dtype=torch.bool)  # (B, T)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    columns = torch.arange(numbers.shape[1], device=numbers.device)  # (T,)
    return columns - torch.where(starts, columns, 0).cummax(dim=1).values  # (B, T)


def aligned_width(width: int, limit: int) -> int:
    """Round up to a multiple of 8, which a GPU's attention kernels need, but not over `limit`."""
    return max(width, min(math.ceil(width / 8) * 8, limit))

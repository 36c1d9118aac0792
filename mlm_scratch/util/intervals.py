"""95 % confidence intervals of proportions."""

import math

Z = 1.96  # standard deviations: 95 % of a normal distribution


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Return the Wilson interval of the proportion right / n.

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    share = right / n
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def difference_interval(first: list[bool], second: list[bool]) -> tuple[float, float, float]:
    """Return the second proportion minus the first, and the bounds of its interval.

    Both lists are verdicts on the same cases, so only the cases on which they differ count.

    Source: Wald's interval for paired proportions.
    """
    n = len(first)
    gains = [after - before for before, after in zip(first, second, strict=True)]  # -1, 0, 1
    mean = sum(gains) / n
    half = Z * math.sqrt((sum(gain * gain for gain in gains) / n - mean**2) / n)
    return mean, mean - half, mean + half

"""Confidence intervals against what defines them."""

import math
import statistics

import pytest

from mlm_scratch.util.intervals import difference_interval, wilson_interval


@pytest.mark.parametrize("right, n", [(48, 48), (9, 10), (0, 5), (520, 1000)])
def test_the_interval_is_wilsons(right, n):
    """Its ends are the shares from which the one seen is 1.96 standard deviations away."""
    for end in wilson_interval(right, n):
        deviation = math.sqrt(end * (1 - end) / n)
        assert abs(end - right / n) == pytest.approx(1.96 * deviation, abs=1e-7)


def test_the_interval_of_a_difference_counts_only_where_the_two_differ():
    """That of the mean of the differences."""
    first, second = [True] * 6 + [False] * 4, [True] * 5 + [False] + [True] * 3 + [False]
    gains = [b - a for a, b in zip(first, second, strict=True)]
    mean, low, high = difference_interval(first, second)
    assert mean == pytest.approx(0.2) == statistics.mean(gains)
    half = 1.96 * statistics.pstdev(gains) / math.sqrt(10)
    assert (low, high) == pytest.approx((mean - half, mean + half))
    assert difference_interval(first, first) == (0, 0, 0)

"""Numbers of positions that stay the same from batch to batch, with every masked token."""

import pytest
import torch

from mlm_scratch.speed.shapes import aligned_width, pad_positions


def masked(n, total=1000):
    """(total,) bool, n of them true, in the middle."""
    is_masked = torch.zeros(total, dtype=torch.bool)
    is_masked[100 : 100 + n] = True
    return is_masked


def test_the_number_is_the_same_whatever_chance_masks():
    sizes = {len(pad_positions(masked(n), 0.15)) for n in (0, 100, 150, 210)}
    assert len(sizes) == 1 and 210 < sizes.pop() < 250


@pytest.mark.parametrize("n", [218, 219, 230, 400, 1000])
def test_more_masked_tokens_than_chance_allows_are_all_there(n):
    """Whole words vary more: coarse steps, so that few numbers are new."""
    positions = pad_positions(masked(min(n, 900)), 0.15).tolist()
    assert {*range(100, 100 + min(n, 900))} <= {*positions}
    assert len({*positions}) == len(positions)
    usual = len(pad_positions(masked(0), 0.15))
    assert (len(positions) - usual) % 64 == 0 or len(positions) == 1000


@pytest.mark.parametrize(
    "width, limit, aligned", [(1, 64, 8), (8, 64, 8), (9, 64, 16), (61, 63, 63)]
)
def test_a_width_is_rounded_up_to_8_within_the_limit(width, limit, aligned):
    assert aligned_width(width, limit) == aligned

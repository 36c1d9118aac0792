"""Which rows of a step are whose, and how many masked tokens the step has."""

from types import SimpleNamespace

import pytest
import torch

from mlm_scratch.masking import IGNORE
from mlm_scratch.parallel.shares import own_rows, share_among
from tests.support.tiny import batch_of


def step(n_rows):
    """Rows of 4 tokens; row r has r + 1 masked ones, up to 4. Id 0 is a word like any other."""
    ids = torch.zeros(n_rows, 4, dtype=torch.int64)  # (B, T)
    is_masked = torch.arange(4) <= torch.arange(n_rows)[:, None]  # (B, T)
    return batch_of(ids, None, torch.where(is_masked, 0, IGNORE))


def ranks(rank, size, summed):
    """Ranks whose sums are noted, and doubled in place of those of the others."""

    def all_reduce_sum(tensor):
        summed.append(tensor.item())
        tensor *= 2

    return SimpleNamespace(rank=rank, size=size, all_reduce_sum=all_reduce_sum)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 8, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_row_belongs_to_one_rank(n, size):
    parts = [own_rows(n, SimpleNamespace(rank=rank, size=size)) for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(n))
    assert max(map(len, parts)) == -(-n // size)


def test_masked_tokens_are_those_of_the_whole_step():
    summed = []
    for rank, rows in ((0, [0, 1]), (1, [2])):
        own, n_masked = share_among(ranks(rank, 2, summed), complete=True)(step(3))
        assert len(own.labels) == len(rows) and n_masked == 1 + 2 + 3
    assert summed == []


def test_rows_of_other_ranks_that_are_zeros_do_not_count():
    """A rank has only its own rows of a stream: the labels of the others mean nothing."""
    summed = []
    for rank, own_count in ((0, 1 + 2), (1, 3)):
        own, n_masked = share_among(ranks(rank, 2, summed), complete=False)(step(3))
        assert len(own.positions) == summed[-1] == own_count and n_masked == 2 * own_count


def test_a_rank_without_rows_computes_one_without_labels():
    own, n_masked = share_among(ranks(2, 3, []), complete=True)(step(2))
    assert own.labels.tolist() == [[IGNORE] * 4] and len(own.positions) == 0 and n_masked == 3

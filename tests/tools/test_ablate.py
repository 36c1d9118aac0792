"""What the ablation changes is what it says it changes."""

import numpy as np
import torch

from mlm_scratch.config import changed, flat
from mlm_scratch.loader import Collator, TokenRows
from tests.support.tiny import byte_level_tokenizer
from tests.tools.ablate import BASE, CHANGES, MaskedOnce

RATES = 0.5, 0.5


def test_masks_that_are_drawn_once_are_the_same_in_every_epoch():
    """And the same as Collator draws for all rows at once."""
    tokenizer = byte_level_tokenizer()
    lengths = [7, 3, 9, 5, 9]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = TokenRows(np.arange(10, 10 + starts[-1]).astype(np.uint16), starts)
    whole = Collator(tokenizer, mask_rates=RATES)(rows, np.arange(5))
    once, anew = (cls(tokenizer, mask_rates=RATES) for cls in (MaskedOnce, Collator))
    differs = False
    for order in ([4, 1], [1, 3, 0], [1, 4], [2]):
        batch, other = once(rows, np.array(order)), anew(rows, np.array(order))
        width = max(lengths[row] for row in order)
        assert torch.equal(batch.input_ids, whole.input_ids[order, :width])
        assert torch.equal(batch.labels, whole.labels[order, :width])
        assert torch.equal(batch.positions, (batch.labels.flatten() != -100).nonzero()[:, 0])
        assert (batch.attention_mask is None) == (len({lengths[row] for row in order}) == 1)
        differs |= not torch.equal(batch.labels, other.labels)
    assert differs


def test_each_change_is_a_setting_of_the_recipe():
    for change in CHANGES.values():
        assert all(flat(BASE)[name] != value for name, value in change.items())
        changed(BASE, **change)

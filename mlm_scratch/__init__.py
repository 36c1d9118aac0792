"""Masked-language-model training written out by hand.

Read in this order, each from top to bottom:

    masking.py    which tokens to hide and what to put there
    loader.py     from rows of token ids to the batches of each optimizer step
    model.py      the loss, with the head on masked positions only
    optim.py      AdamW's groups and the schedule
    loop.py       the explicit AMP training loop
    fill_mask.py  top-k fills

Write each yourself: python -m mlm_scratch.exercise.

Beside them: evaluate.py, precision.py, config.py. Each folder covers one topic that you may skip
on a first reading; README.md in this folder describes them.
"""

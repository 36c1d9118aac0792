"""A side effect of Trainer, repeated so that dropout draws the same numbers."""

import torch


def draw_like_dataloader() -> None:
    """Draw one number from torch's own generator and drop it.

    torch's DataLoader draws a base seed at each epoch start; drawing one too keeps dropout on
    Trainer's RNG stream.
    """
    torch.empty((), dtype=torch.int64).random_()

"""The words that a mask may become, when only some are to be considered."""

import sys

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlm_scratch.errors import UserError


def find_target_ids(tokenizer: PreTrainedTokenizerBase, targets: str | list[str]) -> Tensor:
    """The ids of the targets. One that is not in the vocabulary stands for its first piece, with a
    warning: with a byte-level BPE, words inside a sentence are written with a leading space.

    Raises UserError if no target is left.
    """
    vocabulary = tokenizer.get_vocab()
    ids = []
    for target in [targets] if isinstance(targets, str) else targets:
        if target in vocabulary:
            ids.append(vocabulary[target])
            continue
        pieces = tokenizer(target, add_special_tokens=False)["input_ids"]
        ids += pieces[:1]
        if len(pieces) != 1:
            instead = f"taking {tokenizer.decode(pieces[:1])!r}" if pieces else "leaving it out"
            print(f"warning: target {target!r} is not one token, {instead}", file=sys.stderr)
    if not ids:
        raise UserError("none of the targets gives a token of the vocabulary")
    return torch.tensor(list(set(ids)))  # through a set as in the reference: its order breaks ties


def with_leading_space(
    tokenizer: PreTrainedTokenizerBase, targets: list[str], text: str
) -> list[str]:
    """The targets as they are written at the masks of `text`: after a space, byte-level BPE has
    " pizza" for a token where "pizza" is none, and means another one by "the" than by " the"."""
    start, *rest = text.split(tokenizer.mask_token)
    after_space = all(part.endswith(" ") for part in (start, *rest[:-1]))
    if not after_space:
        return targets
    tokens_of = {
        target: tokenizer(f" {target}", add_special_tokens=False)["input_ids"] for target in targets
    }
    return [
        f" {target}" if target[:1].strip() and len(tokens) == 1 else target
        for target, tokens in tokens_of.items()
    ]

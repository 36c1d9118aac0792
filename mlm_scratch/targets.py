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
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            instead = f"taking {tokenizer.decode(pieces[:1])!r}" if pieces else "leaving it out"
            print(f"warning: target {target!r} is not one token, {instead}", file=sys.stderr)
    if not ids:
        raise UserError("none of the targets gives a token of the vocabulary")
    return torch.tensor(list(set(ids)))  # through a set as in the reference: its order breaks ties


def with_leading_space(
    tokenizer: PreTrainedTokenizerBase, targets: list[str], text: str
) -> list[str]:
    """The targets as they are written at the masks of `text`: after a space, byte-level BPE has
    " pizza" for a token where "pizza" is none, and means another one by "the" than by " the". With
    masks of both kinds in one text they stay as they are."""
    start, *rest = text.split(tokenizer.mask_token)
    if not all(part[-1:].isspace() for part in (start, *rest[:-1])):
        return targets

    def spaced(target: str) -> str:
        ids = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
        return f" {target}" if target[:1].strip() and len(ids) == 1 else target

    return [spaced(target) for target in targets]

"""The texts and targets that people type, as model and tokenizer take them."""

import inspect
import re
import sys

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.errors import UserError
from mlm_scratch.load import longest_input

MASK_SPELLINGS = re.compile(r"<mask>|\[MASK\]")


def use_own_mask(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Write every <mask> and [MASK] in `text` the way this tokenizer does."""
    return MASK_SPELLINGS.sub(lambda match: tokenizer.mask_token, text)


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    truncate: bool = False,
) -> BatchEncoding:
    """What the model is given for some texts, padded to the longest: (B, T) tensors.

    Raises UserError for a text that is too long (unless it is to be cut) or not UTF-8.
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text {shortened(text)} is not UTF-8") from error
    limit = longest_input(tokenizer, model)
    cut = {"truncation": True, "max_length": limit} if truncate else {}
    several = {"padding": True, "padding_side": "right"} if len(texts) > 1 else {}
    inputs = tokenizer(
        texts, return_attention_mask=True, return_tensors="pt", verbose=False, **several, **cut
    )
    for text, length in zip(texts, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
        if length > limit:
            raise UserError(
                f"the text {shortened(text)} has {length} tokens, the model takes {limit}: "
                "shorten it, or let infer.py cut it with --truncate"
            )
    return inputs


def find_masks(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, text: str) -> Tensor:
    """(T,) ids of `text` -> (M,) where its masks are. Raises UserError if there is none."""
    mask_index = (input_ids == tokenizer.mask_token_id).nonzero().squeeze(1)  # (M,)
    if len(mask_index) == 0:
        where = " that --truncate leaves" if tokenizer.mask_token in text else ""
        raise UserError(
            f"no {tokenizer.mask_token} in the text {shortened(text)}{where}: mark the gap"
        )
    return mask_index


def find_words(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, text: str) -> Tensor:
    """(T,) ids of `text` -> (N,) where its tokens are that are not special. An unknown word is a
    word. Raises UserError if there is none, or if one of them is a mask."""
    if tokenizer.mask_token_id in input_ids:
        raise UserError(f"the text {shortened(text)} has a mask: give the words to score")
    apart = [id for id in tokenizer.all_special_ids if id != tokenizer.unk_token_id]
    words = (~torch.isin(input_ids, torch.tensor(apart))).nonzero().squeeze(1)  # (N,)
    if len(words) == 0:
        raise UserError(f"the text {shortened(text)} has no token to score")
    return words


def ignores_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has the same fills in a batch with longer ones. FNet, which has no attention,
    mixes the padding in."""
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    return takes_mask and tokenizer.pad_token is not None


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
    return [
        f" {target}" if _takes_space(tokenizer, target) else target for target in targets
    ]


def _takes_space(tokenizer: PreTrainedTokenizerBase, target: str) -> bool:
    spaced, bare = tokenizer([f" {target}", target], add_special_tokens=False)["input_ids"]
    if not target[:1].strip() or not str(tokenizer.decode(spaced[:1])).strip():
        return False  # begins with a space, or the space is a token by itself
    return len(spaced) == 1 or len(bare) > 1  # of several pieces the first begins the word


def shortened(text: str) -> str:
    """A text as it is quoted in an error."""
    return repr(text if len(text) <= 60 else text[:57] + "...")

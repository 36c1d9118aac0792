"""The texts and targets that people type, as model and tokenizer take them."""

import functools
import re
import sys
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.load import REFUSALS, in_eval_mode, longest_input
from mlm_scratch.util.errors import UserError, shortened

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
        check_utf8(text, "text")
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


def ask(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, T) inputs -> (B, T, V) logits, without dropout. Raises UserError for what the model
    cannot take."""
    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    try:
        with in_eval_mode(model):
            return model(**on_device).logits
    except REFUSALS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the model cannot take this text: {reason}") from error


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


def find_target_ids(tokenizer: PreTrainedTokenizerBase, targets: str | list[str]) -> Tensor:
    """The ids of the targets. One that is not in the vocabulary is tokenized; where that gives
    several pieces the first is taken, with a warning.

    Raises UserError if no target is left, or one is not UTF-8.
    """
    vocabulary = tokenizer.get_vocab()
    ids = []
    for target in [targets] if isinstance(targets, str) else targets:
        check_utf8(target, "target")
        ids += [vocabulary[target]] if target in vocabulary else _first_piece(tokenizer, target)
    if not ids:
        raise UserError("none of the targets gives a token of the vocabulary")
    return torch.tensor(list(set(ids)))  # through a set as in the reference: its order breaks ties


def _first_piece(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Its id, or none; with a warning if there are more of them."""
    pieces = tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
        instead = f"taking {tokenizer.decode(pieces[:1])!r}" if pieces else "leaving it out"
        _warn_once(f"target {target!r} is not one token, {instead}")
    return pieces[:1]


@functools.cache
def _warn_once(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, not into it


def spell_target(tokenizer: PreTrainedTokenizerBase, target: str, before: str) -> str:
    """A target as the vocabulary has it at a mask that follows the text `before`.

    Byte-level BPE has other tokens for words after a space: "is" is "Ġis" after "A ", but "is"
    after "A (". With SentencePiece it is "▁is" at the beginning of a text, too.
    """
    check_utf8(target, "target")
    if not target.strip() or target[0].isspace():
        return target
    own_id = tokenizer.get_vocab().get(target)
    # To byte-level BPE "é" is the name of a byte that is no letter; the letter is "Ã©".
    is_token = own_id is not None and "\ufffd" not in tokenizer.decode([own_id])
    after_space = before[-1:].isspace()
    if is_token and before and not after_space:
        return target
    spelled = f" {target}" if after_space else target
    pieces = tokenizer(spelled, add_special_tokens=False)["input_ids"]
    if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
        if is_token:
            return target
        space_alone = not str(tokenizer.decode(pieces[:1])).strip()
        pieces = _first_piece(tokenizer, target if space_alone else spelled)
    return tokenizer.convert_ids_to_tokens(pieces)[0] if pieces else target


def check_utf8(text: str, what: str) -> None:
    """Raise UserError for bytes on the command line or in a file that are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the {what} {shortened(text)} is not UTF-8") from error

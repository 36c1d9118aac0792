"""Turn the texts and targets that users type into the inputs of a model."""

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.fill_mask import FillError
from mlm_scratch.hf.checks import REFUSALS, in_eval_mode, longest_input
from mlm_scratch.util.errors import UserError, first_line, is_out_of_memory, is_own_fault, shortened

MASK_SPELLINGS = re.compile(r"<mask>|\[MASK\]")


def use_own_mask(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Replace every <mask> and [MASK] in `text` by this tokenizer's mask token."""
    return MASK_SPELLINGS.sub(lambda match: tokenizer.mask_token, text)


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    truncate: bool = False,
) -> BatchEncoding:
    """Tokenize texts for a model, padded to the longest: (B, T) tensors.

    Raises:
        UserError: a text is too long (unless `truncate`) or not UTF-8.
    """
    for text in texts:
        check_utf8(text, "text")
    limit = longest_input(tokenizer, model)
    cut = {"truncation": True, "max_length": limit} if truncate else {}
    padding = {"padding": True, "padding_side": "right"} if len(texts) > 1 else {}
    inputs = tokenizer(
        texts, return_attention_mask=True, return_tensors="pt", verbose=False, **padding, **cut
    )
    for text, length in zip(texts, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
        if length > limit:
            raise UserError(
                f"the text {shortened(text)} has {length} tokens, the model takes {limit}: "
                "shorten it, or let infer.py cut it with --truncate"
            )
    return inputs


@torch.no_grad()
def logits_at(model: PreTrainedModel, input_ids: Tensor, at: Tensor) -> Tensor:
    """Run the model without dropout: (B, T) ids, no padding -> (B, M, V) logits, fp32 on the CPU.

    Args:
        model: a masked-LM.
        input_ids: (B, T).
        at: (B, M) the positions in each row whose logits are returned.

    Raises:
        UserError: the model does not support these inputs.
    """
    with in_eval_mode(model), refusals_reported(model):
        logits = model(input_ids=input_ids.to(model.device)).logits  # (B, T, V)
    row = torch.arange(len(logits), device=logits.device)[:, None]  # (B, 1)
    return logits[row, at.to(logits.device)].float().cpu()  # (B, M, V)


@contextmanager
def refusals_reported(model: PreTrainedModel) -> Iterator[None]:
    """Turn what a model, or chapter 6, raises for its inputs into a UserError."""
    try:
        yield
    except FillError as error:
        raise UserError(str(error)) from error
    except REFUSALS as error:
        if is_own_fault(error):
            raise
        if is_out_of_memory(error):
            raise UserError(
                f"{model.device} is out of memory for this text: shorten it, or change --device"
            ) from error
        raise UserError(f"the model cannot take this text: {first_line(error)}") from error


def find_masks(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, text: str) -> Tensor:
    """(T,) ids of `text` -> (M,) positions of its masks. Raises UserError if there is none."""
    mask_index = (input_ids == tokenizer.mask_token_id).nonzero().squeeze(1)  # (M,)
    if len(mask_index) == 0:
        where = " that --truncate leaves" if tokenizer.mask_token in text else ""
        raise UserError(
            f"no {tokenizer.mask_token} in the text {shortened(text)}{where}: write it where a "
            "word is missing"
        )
    return mask_index


def find_words(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, text: str) -> Tensor:
    """(T,) ids of `text` -> (N,) positions of its non-special tokens; unknown words count.

    Raises:
        UserError: there is none, or one of them is a mask.
    """
    if tokenizer.mask_token_id in input_ids:
        raise UserError(f"the text {shortened(text)} has a mask: give the words to score")
    special = [id for id in tokenizer.all_special_ids if id != tokenizer.unk_token_id]
    words = (~torch.isin(input_ids, torch.tensor(special))).nonzero().squeeze(1)  # (N,)
    if len(words) == 0:
        raise UserError(f"the text {shortened(text)} has no token to score")
    return words


def check_targets(tokenizer: PreTrainedTokenizerBase, targets: str | list[str]) -> None:
    """Warn about targets outside the vocabulary that are split into several pieces, or none.

    Raises:
        UserError: a target is not UTF-8.
    """
    vocabulary = tokenizer.get_vocab()
    for target in [targets] if isinstance(targets, str) else targets:
        check_utf8(target, "target")
        if target not in vocabulary:
            _first_piece(tokenizer, target)


def spell_target(tokenizer: PreTrainedTokenizerBase, target: str, before: str) -> str:
    """Return the vocabulary's spelling of a target for a mask that follows the text `before`.

    Byte-level BPE has separate tokens for words after a space: "is" is "Ġis" after "A ", but "is"
    after "A (". SentencePiece has "▁is" at the start of a text, too.
    """
    check_utf8(target, "target")
    if not target.strip() or target[0].isspace():
        return target
    own_id = tokenizer.get_vocab().get(target)
    # In byte-level BPE, the entry "é" is one byte, not a whole letter; the letter é is "Ã©".
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


def _first_piece(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Return a list with the id of a target's first piece, if any; warn unless it is one token."""
    pieces = tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
        instead = f"taking {tokenizer.decode(pieces[:1])!r}" if pieces else "leaving it out"
        _warn_once(f"target {target!r} is not one token, {instead}")
    return pieces[:1]


@functools.cache
def _warn_once(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, not into it


def ids_without_token(tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """List the ids below `size` that stand for no token: many models have padded embeddings."""
    return sorted({*range(size)} - {*tokenizer.get_vocab().values()})


def visible_token(id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a token as its vocabulary spells it, quoted if it would be invisible."""
    token = tokenizer.convert_ids_to_tokens([id])[0]
    if token is None:  # many models have more embeddings than their tokenizer has tokens
        return f"#{id}"
    return token if token.isprintable() and token.strip() else repr(token)


def check_utf8(text: str, what: str) -> None:
    """Raise UserError for a text, typed or read from a file, that is not valid UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the {what} {shortened(text)} is not UTF-8") from error

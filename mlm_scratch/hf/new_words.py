"""New words for a tokenizer and its model: whole tokens instead of pieces, from the first step on.

A word is added to the tokenizer's own vocabulary, in the spelling of its algorithm:

    byte-level BPE    Ġword after a space, word elsewhere: two tokens, as for every common word
    WordPiece         word
    Unigram           ▁word

`add_tokens` of transformers would instead split the text at the word before any other step: with
byte-level BPE and SentencePiece, the space before the word would become a separate token.
"""

import json
import sys
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlm_scratch.hf.checks import longest_input
from mlm_scratch.util.errors import UserError, shortened

OWN_SETTINGS = {  # a tokenizer's arguments that describe its files, not its behaviour
    *("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "tokenizer_object"),
    *("name_or_path", "added_tokens_decoder"),
}


def add_words(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, words: list[str]
) -> PreTrainedTokenizerBase:
    """Add words to a tokenizer, and to its model in place.

    A new token starts with the mean of the weights of its former pieces. Words that are already
    tokens are skipped. So are words with a space or a hyphen, with a warning: tokenizers split
    there before they look up the vocabulary.

    Returns:
        the new tokenizer.

    Raises:
        UserError: no word can be added.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("--add-tokens: the tokenizer of this model cannot be changed")
    state = json.loads(backend.to_str())
    kind, in_vocabulary = state["model"]["type"], tokenizer.get_vocab()
    pieces, cut = {}, []  # of each new token; words that cannot be one
    for word in words:
        spellings = [f" {word}", word] if kind == "BPE" else [word]
        for spelling in spellings:
            token = _as_one_token(backend, kind, spelling)
            if token is None:
                cut.append(word)
                break
            if token not in in_vocabulary:
                pieces[token] = tokenizer(spelling, add_special_tokens=False)["input_ids"]
    if cut:
        some = ", ".join(map(repr, cut[:5])) + (", ..." if len(cut) > 5 else "")
        print(f"warning: --add-tokens: not one word for this tokenizer: {some}", file=sys.stderr)
    pieces = {token: ids for token, ids in pieces.items() if ids}
    if not pieces:
        raise UserError("--add-tokens: none of the words can be added; tokens already, or cut")
    first_id = max(in_vocabulary.values()) + 1
    _extend(state["model"], [*pieces], pieces, first_id, tokenizer)
    settings = {k: v for k, v in tokenizer.init_kwargs.items() if k not in OWN_SETTINGS}
    extended = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **settings | {"model_input_names": tokenizer.model_input_names},
    )
    for number, token in enumerate(pieces):
        if extended.convert_tokens_to_ids(token) != first_id + number:
            raise UserError(
                f"--add-tokens: {shortened(token)} cannot be added to a {kind} tokenizer"
            )
    _extend_weights(model, first_id, [*pieces.values()])
    extended.model_max_length = longest_input(tokenizer, model)
    return extended


def how_to_load(tokenizer: PreTrainedTokenizerBase) -> str:
    """Say what loads a tokenizer with new words; "" if every class does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(getattr(backend, "model", None), "ignore_merges", False):
        return ""
    return (
        "load its tokenizer with AutoTokenizer or the tokenizers library: RobertaTokenizer and "
        "other classes of one kind drop ignore_merges, and cut the new words again"
    )


def _as_one_token(backend: Tokenizer, kind: str, spelling: str) -> str | None:
    """Return the single token that would spell this text; None if it is split before the lookup."""
    text = backend.normalizer.normalize_str(spelling) if backend.normalizer else spelling
    parts = [text]
    if backend.pre_tokenizer:
        parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return parts[0] if len(parts) == 1 and parts[0].strip() else None


def _extend(
    vocabulary: dict[str, Any],
    tokens: list[str],
    pieces: dict[str, list[int]],
    first_id: int,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Add tokens to the vocabulary of a tokenizer's file, with ids from first_id on."""
    if vocabulary["type"] == "Unigram":  # a list of [token, log probability], by id
        entries = vocabulary["vocab"]
        for id in range(len(entries), first_id):  # special tokens may be outside the list
            entries.append([tokenizer.convert_ids_to_tokens(id), -100.0])
        for token in tokens:  # a little more probable than its pieces together
            entries.append([token, 1.0 + sum(entries[id][1] for id in pieces[token])])
        return
    if vocabulary["type"] not in ("BPE", "WordPiece"):
        raise UserError(f"--add-tokens: not possible with a {vocabulary['type']} tokenizer")
    vocabulary["vocab"] |= {token: first_id + number for number, token in enumerate(tokens)}
    if vocabulary["type"] == "BPE":
        vocabulary["ignore_merges"] = True  # look a word up before merging its pieces


@torch.no_grad()
def _extend_weights(model: PreTrainedModel, first_id: int, pieces: list[list[int]]) -> None:
    """Give each new token the mean weights of its pieces, in the embeddings and in the head."""
    old_size = model.config.vocab_size
    size = max(old_size, first_id + len(pieces))
    if size > old_size:
        before = _sharing(model)
        model.resize_token_embeddings(size, mean_resizing=False)
        for name, first in _sharing(model).items():
            if before[name] != first:  # resizing ties BERT's biases even if the head is untied
                module, _, leaf = name.rpartition(".")
                own = nn.Parameter(model.get_parameter(name).clone())
                setattr(model.get_submodule(module), leaf, own)
    for parameter in _by_token(model, size):
        for id, ids in enumerate(pieces, start=first_id):
            parameter[id] = parameter[ids].mean(dim=0)


def _sharing(model: nn.Module) -> dict[str, str]:
    """Map each parameter's name to the first name of the same tensor."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _by_token(model: nn.Module, size: int) -> list[Tensor]:
    """List the parameters that have a row for each token: embeddings, decoder, bias."""
    return [
        parameter
        for parameter in model.parameters()
        if len(parameter.shape) and len(parameter) == size
    ]

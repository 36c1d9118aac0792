"""What a model can do, its limits, and whether its weights are sound.

What it can do is detected by running a small batch, not by its name: so an unforeseen model either
works or falls back to the plain path.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.data.packing import pack
from mlm_scratch.masking import IGNORE
from mlm_scratch.model import MaskedLM
from mlm_scratch.util.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

# What models raise for inputs, or for half-precision numbers, that they do not support.
REFUSALS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)  # kinds of RuntimeError
NO_LIMIT = 10**9  # a tokenizer that does not know its model's limit says 10**30


@torch.no_grad()
def sparse_head_works(model: MaskedLM) -> bool:
    """Whether the head on some positions gives what the full forward pass gives there.

    If not, the head has to run on all positions.
    """
    model = copy_with_the_same_weights(model)
    input_ids, attention_mask = _small_batch(model)  # (B, T), (B, T)
    positions = torch.tensor([1, 2, 7], device=input_ids.device)  # (N,)
    try:
        with in_eval_mode(model):
            dense = model.logits(input_ids, attention_mask, None)[positions]  # (N, V)
            sparse = model.logits(input_ids, attention_mask, positions)  # (N, V)
        return sparse.shape == dense.shape and torch.allclose(sparse, dense, rtol=1e-3, atol=1e-4)
    except DEVICE_ERRORS:
        raise
    except REFUSALS:
        return False


@torch.no_grad()
def ready_mask_works(model: MaskedLM, length: int) -> bool:
    """Whether rows of up to `length` tokens have the same logits with a ready attention mask.

    Layers with local attention would take it in place of their window. That shows only in rows
    longer than the window, so `length` has to be that of the run's rows.
    """
    tried = copy_with_the_same_weights(model)
    lengths = [length, length // 2]
    rows = _rows_of(lengths, model)  # (B, T) each
    try:
        with in_eval_mode(tried):
            at = _some(torch.arange(sum(lengths)))  # (n,) flat, none of them padding
            expected = _logits_at(tried, at, *rows)
            tried.ready_mask = True
            return _nearly_equal(_logits_at(tried, at, *rows), expected)
    except DEVICE_ERRORS:
        raise
    except REFUSALS:
        return False


@torch.no_grad()
def packing_works(model: MaskedLM, length: int) -> bool:
    """Whether packed rows of `length` tokens have the logits of each text alone.

    Sets model.first_position: RoBERTa and its kin count from padding_idx + 1. As with a ready mask,
    the loss of a window shows only in rows that are longer, so `length` is that of the run's rows.
    """
    tried = copy_with_the_same_weights(model)
    tried.first_position = 0  # it is part of the position ids here
    lengths = [length, length // 2, max(1, length - length // 2 - 1)]
    input_ids, attention_mask = _rows_of(lengths, model)  # (B, T) each
    labels = torch.full_like(input_ids, IGNORE)
    packed_ids, texts, _, position_ids = pack(input_ids, attention_mask, labels, length)
    # Best fit keeps the order of texts that become shorter: the flat indices agree.
    at_packed = _some(texts.flatten().nonzero().squeeze(1))  # (n,)
    at = _some(attention_mask.flatten().nonzero().squeeze(1))  # (n,)
    try:
        with in_eval_mode(tried):
            alone = [
                _logits_at(tried, at[at // length == row] - row * length, ids[None, :n])
                for row, (ids, n) in enumerate(zip(input_ids, lengths, strict=True))
            ]  # (n of the row, V) each
            expected = torch.cat(alone)  # (n, V)
            tried.ready_mask = True
            packed = partial(_logits_at, tried, at_packed, packed_ids, texts)
            # Tried one after the other: from the second, a model may not have enough positions.
            right = (
                first
                for first in sorted({0, _padding_idx(model) + 1})
                if _nearly_equal(packed(position_ids + first), expected)
            )
            first_position = next(right, None)
    except DEVICE_ERRORS:
        raise
    except REFUSALS:
        return False
    model.first_position = first_position or 0
    return first_position is not None


@torch.no_grad()
def ignores_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has the same logits in a batch with longer ones.

    Some models mix padding in, whatever the attention mask says: by a convolution, or by a Fourier
    transform.
    """
    if tokenizer.pad_token_id is None:
        return False
    model = copy_with_the_same_weights(model)
    length = min(32, longest_input(tokenizer, model))
    input_ids = torch.arange(2 * length, device=model.device).view(2, length)  # (B, T)
    input_ids %= model.config.vocab_size
    attention_mask = torch.ones_like(input_ids)  # (B, T)
    short = length // 4
    input_ids[0, short:], attention_mask[0, short:] = tokenizer.pad_token_id, 0
    try:
        with in_eval_mode(model):
            batch = model(input_ids=input_ids, attention_mask=attention_mask).logits  # (B, T, V)
            alone = model(input_ids=input_ids[:1, :short]).logits  # (1, short, V)
        return torch.allclose(batch[:1, :short], alone, rtol=1e-3, atol=1e-4)
    except DEVICE_ERRORS:
        raise
    except REFUSALS:
        return False


def unused_parameters(model: MaskedLM) -> list[nn.Parameter]:
    """List the parameters that the loss never reaches, such as a pooler's."""
    copy_with_the_same_weights(model).logits(*_small_batch(model), None).sum().backward()
    unused = [parameter for parameter in model.parameters() if parameter.grad is None]
    model.zero_grad()
    return unused


def bf16_works(model: MaskedLM) -> bool:
    """Whether the model runs forward and backward with bf16 products on a CPU."""
    tried = copy_with_the_same_weights(model)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            logits = tried.logits(*_small_batch(model), None)  # (B * T, V)
        logits.float().sum().backward()
    except DEVICE_ERRORS:
        raise
    except REFUSALS:
        return False
    finally:
        model.zero_grad()
    return True


def check_fit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str | Path) -> None:
    """Raise UserError unless the two can do masked-language modelling together."""
    if tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {name} has no mask token: choose another model")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        files = " or ".join(sorted(set(tokenizer.vocab_files_names.values())))
        raise UserError(
            f"the tokenizer of {name} has no words: its vocabulary file is missing ({files})"
        )
    embeddings = getattr(model.get_input_embeddings(), "weight", None)  # (V, H)
    if not isinstance(embeddings, Tensor):
        raise UserError(f"{name} has no table of token embeddings: choose another model")
    if len(tokenizer) > (rows := len(embeddings)):
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its model only {rows} embeddings"
        )
    if (largest := max(tokenizer.get_vocab().values())) >= rows:  # ids may have holes
        raise UserError(
            f"the tokenizer of {name} has ids up to {largest}, its model only {rows} embeddings"
        )


def check_no_nan(scores: Tensor) -> None:
    """Raise UserError if a model's probabilities contain NaN."""
    if scores.isnan().any():
        raise UserError("the model outputs NaN: its weights are damaged, choose another")


def weights_are_finite(model: nn.Module) -> bool:
    """Whether no weight is NaN or infinite. Reads the answer for all of them at once."""
    return bool(torch.stack([weight.isfinite().all() for weight in model.parameters()]).all())


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; afterwards the model is back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def longest_input(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Return the most tokens that both support in one text, special tokens included."""
    limits = [tokenizer.model_max_length, NO_LIMIT]
    if (configured := getattr(model.config, "max_position_embeddings", None) or 0) > 0:
        limits.append(configured)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)  # (positions, H)
        if name.endswith("position_embeddings") and isinstance(weight, Tensor):
            # RoBERTa and its kin count positions from padding_idx + 1: 514 rows hold 512 tokens.
            padding_idx = getattr(module, "padding_idx", None)
            limits.append(len(weight) - (0 if padding_idx is None else padding_idx + 1))
    return min(limits)


def copy_with_the_same_weights(model: Model) -> Model:
    """Copy a model before running it: a short row permanently changes BigBird's attention type."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _rows_of(lengths: list[int], model: MaskedLM) -> tuple[Tensor, Tensor]:
    """Return texts of these lengths, the longest first: ids and attention mask, (B, T) each."""
    vocab_size, padding_idx = model.hf_model.config.vocab_size, _padding_idx(model)
    columns = torch.arange(lengths[0])  # (T,)
    attention_mask = (columns < torch.tensor(lengths)[:, None]).long()  # (B, T)
    input_ids = torch.arange(attention_mask.numel()).view_as(attention_mask) % vocab_size  # (B, T)
    # RoBERTa does not count padding, wherever it is: none of it within a text.
    input_ids.masked_fill_(input_ids == padding_idx, (padding_idx + 1) % vocab_size)
    return input_ids, attention_mask


def _padding_idx(model: MaskedLM) -> int:
    return getattr(model.hf_model.config, "pad_token_id", None) or 0


def _some(indices: Tensor) -> Tensor:
    """Return at most about 64 of some indices, evenly: the head is expensive."""
    return indices[:: 1 + len(indices) // 64]


def _logits_at(
    model: MaskedLM,
    at: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Return the logits at the flat positions `at`, (n, V), for (B, T) inputs."""
    positions = None if model.dense_head else at  # (n,)
    logits = model.logits(input_ids, attention_mask, positions, position_ids)
    return logits[at] if positions is None else logits


def _nearly_equal(logits: Tensor, expected: Tensor) -> bool:
    """Compare strictly: random weights attend to all alike, so a lost window changes little."""
    return bool((logits - expected).abs().max() <= 1e-4 * expected.std())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _small_batch(model: MaskedLM) -> tuple[Tensor, Tensor]:
    vocab_size = model.hf_model.config.vocab_size
    input_ids = torch.arange(8, device=_device(model)).view(2, 4) % vocab_size  # (B, T)
    return input_ids, torch.ones_like(input_ids)  # (B, T), (B, T)

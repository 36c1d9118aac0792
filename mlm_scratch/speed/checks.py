"""What of this folder a model can take, found by running a small batch."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mlm_scratch.hf.checks import (
    DEVICE_ERRORS,
    REFUSALS,
    copy_with_the_same_weights,
    in_eval_mode,
    refusal_means_no,
    sparse_head_works,
)
from mlm_scratch.masking import IGNORE
from mlm_scratch.model import MaskedLM
from mlm_scratch.speed.model import FastMaskedLM
from mlm_scratch.speed.packing import pack


def earliest_gather(model: MaskedLM, length: int) -> nn.Module | None:
    """Find the earliest module after which the masked positions are enough.

    In most models it is the norm after the last layer's attention: two thirds of that layer's
    products come later, and are left to do for 15 % of the positions. A distilroberta step on a CPU
    is 1.08 times as fast. Off, together with the sparse head: --dense-head.

    Args:
        model: it gathers at the encoder's end so far.
        length: of the run's rows; some models pad long rows inside the encoder.

    Returns:
        the module; None if not even the head can do without the other positions.
    """
    if not sparse_head_works(model):
        return None
    tried = _copy_with_other_vectors(model)
    odd = max(5, length - 1 + length % 2)  # no multiple of what a model could pad its rows to
    try:
        names = _modules_without_mixing(tried)
    except DEVICE_ERRORS:
        raise
    except REFUSALS:
        names = []
    for name in names:
        if all(_can_gather_after(tried, name, width) for width in (4, odd)):
            return model.hf_model.base_model.get_submodule(name)
    return model.hf_model.base_model


@refusal_means_no
@torch.no_grad()
def _can_gather_after(model: MaskedLM, name: str, width: int) -> bool:
    """Whether the logits are the same as from the encoder's output, in two rows of this width.

    At more positions than a row has, and (of rows of 4) at a prime number of them: some models cut
    off what is longer than a row, some work on chunks of it.
    """
    rows, at = _rows_of([width, width], model), torch.arange(width + 3 - width % 2)  # (N,) flat
    logits = []
    for module in ("", name):
        tried = copy_with_the_same_weights(model)
        tried.gather_after(tried.hf_model.base_model.get_submodule(module))
        with in_eval_mode(tried):
            logits.append(_logits_at(tried, at, *rows))  # (N, V)
    return _nearly_equal(logits[1], logits[0])


def _modules_without_mixing(model: MaskedLM) -> list[str]:
    """Name the modules of whose output a logit sees its own position alone, as they are run.

    Only those that run once, and return hidden states.
    """
    tried = copy_with_the_same_weights(model).eval()
    outputs: dict[str, list[Any]] = {}
    for name, module in tried.hf_model.base_model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: outputs.setdefault(name, []).append(output)
        )
    input_ids, attention_mask = _rows_of([4, 4], model)  # (B, T) each
    logits = tried.logits(input_ids, attention_mask, None)  # (B * T, V)
    hidden = {
        name: seen[0]
        for name, seen in outputs.items()
        if len(seen) == 1 and _are_hidden_states(seen[0], input_ids)
    }
    if not hidden:
        return []
    gradients = torch.autograd.grad(logits[1].sum(), [*hidden.values()], allow_unused=True)
    reached = [None if grad is None else grad.flatten(0, 1).any(dim=1) for grad in gradients]
    return [
        name
        for name, positions in zip(hidden, reached, strict=True)
        if positions is not None and positions.nonzero().tolist() == [[1]]
    ]


def _are_hidden_states(output: Any, input_ids: Tensor) -> bool:
    if not isinstance(output, Tensor) or not output.requires_grad:
        return False
    return output.shape[:-1] == input_ids.shape


def _copy_with_other_vectors(model: MaskedLM) -> MaskedLM:
    """Copy a model with its own matrices, and noise added to biases and scales.

    A new model's biases are 0, and so are the scales with which some add a layer: what they do to
    other positions would not show.
    """
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors if tensor.dim() > 1})
    generator = torch.Generator().manual_seed(0)  # the run's own draws stay as they are
    for parameter in copied.parameters():
        if parameter.dim() <= 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return copied


@refusal_means_no
@torch.no_grad()
def ready_mask_works(model: FastMaskedLM, length: int) -> bool:
    """Whether rows of up to `length` tokens have the same logits with a ready attention mask.

    Layers with local attention would take it in place of their window. That shows only in rows
    longer than the window, so `length` has to be that of the run's rows.
    """
    tried = copy_with_the_same_weights(model)
    lengths = [length, length // 2]
    rows = _rows_of(lengths, model)  # (B, T) each
    at = _some(torch.arange(sum(lengths)))  # (n,) flat, none of them padding
    with in_eval_mode(tried):
        expected = _logits_at(tried, at, *rows)
        tried.ready_mask = True
        return _nearly_equal(_logits_at(tried, at, *rows), expected)


def first_position_if_packed(model: FastMaskedLM, length: int) -> int | None:
    """Find how the model numbers the first token of a text in a packed row: from 0 or higher.

    RoBERTa and its kin count from padding_idx + 1. None: rows of `length` tokens cannot be packed.
    """
    # Tried one after the other: from the second, a model may not have enough positions.
    firsts = sorted({0, _padding_idx(model) + 1})
    return next((first for first in firsts if packing_works(model, length, first)), None)


@refusal_means_no
@torch.no_grad()
def packing_works(model: FastMaskedLM, length: int, first_position: int) -> bool:
    """Whether packed rows of `length` tokens have the logits of each text alone.

    As with a ready mask, the loss of a window shows only in rows that are longer, so `length` is
    that of the run's rows.
    """
    tried = copy_with_the_same_weights(model)
    lengths = [length, length // 2, max(1, length - length // 2 - 1)]
    input_ids, attention_mask = _rows_of(lengths, model)  # (B, T) each
    labels = torch.full_like(input_ids, IGNORE)
    packed_ids, texts, _ = pack(input_ids, attention_mask, labels, length)
    # Best fit keeps the order of texts that become shorter: the flat indices agree.
    at_packed = _some(texts.flatten().nonzero().squeeze(1))  # (n,)
    at = _some(attention_mask.flatten().nonzero().squeeze(1))  # (n,)
    with in_eval_mode(tried):
        alone = [
            _logits_at(tried, at[at // length == row] - row * length, ids[None, :n])
            for row, (ids, n) in enumerate(zip(input_ids, lengths, strict=True))
        ]  # (n of the row, V) each
        tried.packs, tried.first_position = True, first_position
        packed = _logits_at(tried, at_packed, packed_ids, texts)  # (n, V)
    return _nearly_equal(packed, torch.cat(alone))


@refusal_means_no
def bf16_works(model: MaskedLM) -> bool:
    """Whether the model runs forward and backward with bf16 products on a CPU."""
    tried = copy_with_the_same_weights(model)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            logits = tried.logits(*_rows_of([4, 4], model), None)  # (B * T, V)
        logits.float().sum().backward()
    finally:
        model.zero_grad()
    return True


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
) -> Tensor:
    """Return the logits at the flat positions `at`, (n, V), for (B, T) inputs."""
    positions = None if model.dense_head else at  # (n,)
    logits = model.logits(input_ids, attention_mask, positions)
    return logits[at] if positions is None else logits


def _nearly_equal(logits: Tensor, expected: Tensor) -> bool:
    """Compare strictly: random weights attend to all alike, so a lost window changes little."""
    return bool((logits - expected).abs().max() <= 1e-4 * expected.std())

"""What a model can do, its limits, and whether its weights are sound.

Capabilities are detected by running a small batch, not by the model's name, so an unknown model
either works or falls back to the plain path.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.model import MaskedLM
from mlm_scratch.util.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

# What models raise for inputs, or for half-precision numbers, that they do not support.
REFUSALS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)  # kinds of RuntimeError
NO_LIMIT = 10**9  # a tokenizer that does not know its model's limit reports 10**30


def refusal_means_no(check: Callable[..., bool]) -> Callable[..., bool]:
    """Make a check return False if the model raises an error for its inputs."""

    @functools.wraps(check)
    def checked(*args: Any) -> bool:
        """Run the check."""
        try:
            return check(*args)
        except DEVICE_ERRORS:
            raise
        except REFUSALS:
            return False

    return checked


@refusal_means_no
@torch.no_grad()
def sparse_head_works(model: MaskedLM) -> bool:
    """Whether the head gives the same logits on selected positions as in a full forward pass.

    If not, the head has to run on all positions.
    """
    model = copy_with_the_same_weights(model)
    input_ids, attention_mask = _small_batch(model)  # (B, T), (B, T)
    positions = torch.tensor([1, 2, 7], device=input_ids.device)  # (N,)
    with in_eval_mode(model):
        dense = model.logits(input_ids, attention_mask, None)[positions]  # (N, V)
        sparse = model.logits(input_ids, attention_mask, positions)  # (N, V)
    return sparse.shape == dense.shape and torch.allclose(sparse, dense, rtol=1e-3, atol=1e-4)


@refusal_means_no
@torch.no_grad()
def ignores_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has the same logits in a batch with longer texts.

    Some models mix in padding despite the attention mask: by a convolution or a Fourier transform.
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
    with in_eval_mode(model):
        batch = model(input_ids=input_ids, attention_mask=attention_mask).logits  # (B, T, V)
        alone = model(input_ids=input_ids[:1, :short]).logits  # (1, short, V)
    return torch.allclose(batch[:1, :short], alone, rtol=1e-3, atol=1e-4)


def unused_parameters(model: MaskedLM) -> list[nn.Parameter]:
    """List the parameters that the loss never reaches, such as a pooler's."""
    copy_with_the_same_weights(model).logits(*_small_batch(model), None).sum().backward()
    unused = [parameter for parameter in model.parameters() if parameter.grad is None]
    model.zero_grad()
    return unused


def check_fit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str | Path) -> None:
    """Raise UserError unless tokenizer and model can do masked-language modelling together."""
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
    if (largest := max(tokenizer.get_vocab().values())) >= rows:  # ids may have gaps
        raise UserError(
            f"the tokenizer of {name} has ids up to {largest}, its model only {rows} embeddings"
        )


def check_no_nan(scores: Tensor) -> None:
    """Raise UserError if a model's probabilities contain NaN."""
    if scores.isnan().any():
        raise UserError("the model outputs NaN: its weights are damaged, choose another")


def weights_are_finite(model: nn.Module) -> bool:
    """Whether no weight is NaN or infinite. Synchronizes with the device only once."""
    return bool(torch.stack([weight.isfinite().all() for weight in model.parameters()]).all())


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and restore the model's previous mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def longest_input(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Return the maximum length of a text that both support, in tokens including special ones."""
    limits = [tokenizer.model_max_length, NO_LIMIT]
    if (configured := getattr(model.config, "max_position_embeddings", None) or 0) > 0:
        limits.append(configured)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)  # (positions, H)
        if name.endswith("position_embeddings") and isinstance(weight, Tensor):
            # RoBERTa-like models count positions from padding_idx + 1: 514 rows hold 512 tokens.
            padding_idx = getattr(module, "padding_idx", None)
            limits.append(len(weight) - (0 if padding_idx is None else padding_idx + 1))
    return min(limits)


def copy_with_the_same_weights(model: Model) -> Model:
    """Copy a model but share its weights, so that running the copy leaves the model as it is.

    A short row, for example, permanently changes BigBird's attention type.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _small_batch(model: MaskedLM) -> tuple[Tensor, Tensor]:
    vocab_size = model.hf_model.config.vocab_size
    input_ids = torch.arange(8, device=_device(model)).view(2, 4) % vocab_size  # (B, T)
    return input_ids, torch.ones_like(input_ids)  # (B, T), (B, T)

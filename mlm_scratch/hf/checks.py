"""What a model can do, found out by trying it on a small batch instead of by its name.

So a model that nobody thought of is either right or takes the plain way.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.load import REFUSALS, in_eval_mode, longest_input
from mlm_scratch.model import MaskedLM

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def sparse_head_works(model: MaskedLM) -> bool:
    """Whether the head on chosen positions gives what the whole forward pass gives there.

    Where it does not, the head runs on all positions.
    """
    model = _copy_with_the_same_weights(model)
    input_ids, attention_mask = _small_batch(model)  # (B, T), (B, T)
    positions = torch.tensor([1, 2, 7], device=input_ids.device)  # (N,)
    try:
        with in_eval_mode(model):
            dense = model(input_ids, attention_mask, None)[positions]  # (N, V)
            sparse = model(input_ids, attention_mask, positions)  # (N, V)
        return sparse.shape == dense.shape and torch.allclose(sparse, dense, rtol=1e-3, atol=1e-4)
    except REFUSALS:
        return False


@torch.no_grad()
def ignores_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has the same logits in a batch with longer ones. Some models mix the padding
    in, whatever the attention mask says, with a convolution or a Fourier transform."""
    if tokenizer.pad_token_id is None:
        return False
    model = _copy_with_the_same_weights(model)
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
    except REFUSALS:
        return False


def unused_parameters(model: MaskedLM) -> list[nn.Parameter]:
    """Those that the loss never reaches, such as a pooler's."""
    _copy_with_the_same_weights(model)(*_small_batch(model), None).sum().backward()
    unused = [parameter for parameter in model.parameters() if parameter.grad is None]
    model.zero_grad()
    return unused


def _copy_with_the_same_weights(model: Model) -> Model:
    """To be tried in place of the model: on short rows BigBird turns into another one for good."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _small_batch(model: MaskedLM) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    input_ids = torch.arange(8, device=device).view(2, 4) % model.model.config.vocab_size  # (B, T)
    return input_ids, torch.ones_like(input_ids)  # (B, T), (B, T)

"""Generate text by filling a row of masks over a few rounds, as masked diffusion models do.

    The Milky Way _ _ _ _        4 masks
    The Milky Way is _ galaxy _  the more certain half is filled
    The Milky Way is a galaxy .  then half of what is left, and so on

An MLM is trained to fill few masks among many words, so its first fills are uncertain. The least
certain tokens can be masked and filled again once the rest is there ("remasking").

Sources: Chang et al. 2022, MaskGIT; Nie et al. 2025, Large Language Diffusion Models.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.checks import longest_input
from mlm_scratch.hf.encode import encode, ids_without_token
from mlm_scratch.inference.score import log_probabilities
from mlm_scratch.util.errors import UserError

SHOWN = "_"  # for a mask


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, n: int, remask: int = 0
) -> Iterator[str]:
    """Append n masks to a text, fill them, and yield the text after each round.

    Args:
        model: a masked-LM in eval mode.
        tokenizer: its tokenizer.
        text: the beginning; may be empty.
        n: tokens to write.
        remask: how often the less certain half of them is masked and filled again.

    Raises:
        UserError: with the masks, the text is too long for the model.
    """
    start = f"{text.rstrip()} " if text.strip() else ""
    limit = longest_input(tokenizer, model)
    if len(tokenizer(start, verbose=False)["input_ids"]) + n > limit:
        raise UserError(
            f"--generate {n}: text and masks are too long: the model takes {limit} tokens"
        )
    (input_ids,) = encode(model, tokenizer, [start + tokenizer.mask_token * n])["input_ids"]  # (T,)
    written = (input_ids == tokenizer.mask_token_id).nonzero().squeeze(1)  # (n,)
    certainty = torch.zeros(len(input_ids))  # (T,) log probability of each token when it was chosen
    yield _shown(tokenizer, input_ids)
    for again in range(remask + 1):
        if again:
            least = certainty[written].argsort()[: (len(written) + 1) // 2]  # (n / 2,)
            input_ids[written[least]] = tokenizer.mask_token_id
        while (masks := (input_ids == tokenizer.mask_token_id).nonzero().squeeze(1)).numel():
            best, ids = _best_words(model, tokenizer, input_ids, masks)  # (M,), (M,)
            most = best.topk((len(masks) + 1) // 2).indices  # (M / 2,)
            input_ids[masks[most]], certainty[masks[most]] = ids[most], best[most]
            yield _shown(tokenizer, input_ids)


def _best_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor]:
    """(T,), (M,) -> the log probabilities, (M,), and ids, (M,), of the best tokens at the masks."""
    log_p = log_probabilities(model, input_ids[None], masks[None])[0]  # (M, V)
    never = ids_without_token(tokenizer, log_p.shape[1])
    log_p[:, [*tokenizer.all_special_ids, *never]] = -torch.inf  # no special tokens inside a text
    best, ids = log_p.max(dim=-1)  # (M,), (M,)
    return best, ids


def _shown(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> str:
    special = {*tokenizer.all_special_ids} - {tokenizer.mask_token_id, tokenizer.unk_token_id}
    ids = [id for id in input_ids.tolist() if id not in special]
    text = str(tokenizer.decode(ids))
    return " ".join(text.replace(tokenizer.mask_token, f" {SHOWN} ").split())

"""Top-k fills of masked tokens, by hand: what `pipeline("fill-mask")` does and returns.

    text -> ids -> one forward pass -> the logits at the mask -> softmax -> the k best -> sentences

`predict` goes as far as the softmax; `fill_mask` returns what the pipeline does, scores included.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class FillError(ValueError):
    """Something that the caller can fix: the text, the targets, or the model."""


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Predict the masked tokens of some texts in one forward pass.

    Args:
        model: a masked-LM.
        tokenizer: its tokenizer; several texts need its padding token.
        texts: no longer than the model takes, or else truncated by `max_length`.
        max_length: truncate texts to this many tokens.

    Returns:
        for each text, on the CPU: its ids (T,); the positions of its M masks (M,); and the
        probability of every token of the vocabulary at each of them (M, V).

    Raises:
        FillError: a text without a mask; damaged weights.
    """
    inputs = tokenizer(
        texts,
        padding=len(texts) > 1,
        padding_side="right",
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=True,
        return_tensors="pt",
    )  # (B, T) each
    was_training = model.training
    model.eval()  # without dropout
    try:
        on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        logits = model(**on_device).logits  # (B, T, V)
    finally:
        model.train(was_training)
    predictions = []
    for row, text in enumerate(texts):
        is_token = inputs["attention_mask"][row].bool()  # (T,), false at padding, on the right
        input_ids = inputs["input_ids"][row][is_token]  # (T,), its own T
        mask_index = (input_ids == tokenizer.mask_token_id).nonzero().squeeze(1)  # (M,)
        if len(mask_index) == 0:
            raise FillError(f"no {tokenizer.mask_token} in the text {text!r}")
        at_masks = logits[row, mask_index.to(logits.device)].cpu()  # (M, V)
        probabilities = at_masks.softmax(dim=-1)  # (M, V)
        if probabilities.isnan().any():
            raise FillError("the model outputs NaN: its weights are damaged, choose another")
        predictions.append((input_ids, mask_index, probabilities))
    return predictions


def fill_mask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | list[str],
    *,
    top_k: int = 5,
    targets: str | list[str] | None = None,
    max_length: int | None = None,
    batch_size: int = 1,
) -> list:
    """Fill the masked tokens of one or several texts, each mask by itself.

    Args:
        model: a masked-LM, on any device; run in eval mode and left in the mode it was in.
        tokenizer: its tokenizer.
        texts: text with one or more of the tokenizer's mask tokens, or a list of such.
        top_k: fills per mask, the most probable first; at most as many as there are targets.
        targets: consider only these tokens. Their scores are not renormalised.
        max_length: truncate texts to so many tokens.
        batch_size: texts per forward pass. Above 1 the last digits of the scores change, and some
            models mix padding in.

    Returns:
        for a text with one mask: a list of {"score", "token", "token_str", "sequence"}; with
        several masks: a list of such lists, one per mask; for several texts: a list of these.
        A list of one text gives the same as the text alone.

    Raises:
        FillError: as in `predict`; top_k out of range; no usable target.

    Source: transformers' FillMaskPipeline, whose output this equals.
    """
    if top_k < 1 or (targets is None and top_k > model.config.vocab_size):
        raise FillError(f"top-k must be from 1 to {model.config.vocab_size}, got {top_k}")
    target_ids = None if targets is None else find_target_ids(tokenizer, targets)
    texts = [texts] if isinstance(texts, str) else texts
    fills = []
    for start in range(0, len(texts), batch_size):
        predictions = predict(model, tokenizer, texts[start : start + batch_size], max_length)
        fills += [_best_fills(tokenizer, *each, top_k, target_ids) for each in predictions]
    return fills[0] if len(fills) == 1 else fills  # like the pipeline: lists of one are unwrapped


def find_target_ids(tokenizer: PreTrainedTokenizerBase, targets: str | list[str]) -> Tensor:
    """Look up the ids of targets, (targets,). The first piece stands for one that is no token."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    for target in [targets] if isinstance(targets, str) else targets:
        pieces = tokenizer(target, add_special_tokens=False)["input_ids"]
        ids += [vocabulary[target]] if target in vocabulary else pieces[:1]
    if not ids:
        raise FillError("none of the targets gives a token of the vocabulary")
    return torch.tensor(list(set(ids)))  # through a set, as in the pipeline: its order breaks ties


def _best_fills(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    mask_index: Tensor,
    probabilities: Tensor,
    top_k: int,
    target_ids: Tensor | None,
) -> list:
    """Turn one prediction, (T,), (M,) and (M, V), into the fills of a text."""
    if target_ids is not None:
        probabilities = probabilities[:, target_ids]  # (M, targets), not renormalised
        top_k = min(top_k, len(target_ids))
    scores, choices = probabilities.topk(top_k)  # (M, k), (M, k)
    tokens = choices if target_ids is None else target_ids[choices]  # (M, k)
    of_masks = zip(mask_index.tolist(), scores.tolist(), tokens.tolist(), strict=True)
    fills = [
        [
            {
                "score": score,
                "token": token,
                "token_str": tokenizer.decode([token]),
                "sequence": fill_in(tokenizer, input_ids, index, token),
            }
            for score, token in zip(mask_scores, mask_choices, strict=True)
        ]
        for index, mask_scores, mask_choices in of_masks
    ]
    return fills[0] if len(fills) == 1 else fills


def fill_in(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, index: int, token: int) -> str:
    """Decode input_ids, (T,), with `token` at `index`."""
    filled = input_ids.clone()  # (T,)
    filled[index] = token
    if tokenizer.pad_token_id is not None:
        filled = filled[filled != tokenizer.pad_token_id]
    # Several masks: keep special tokens, as the pipeline does; the unfilled masks are special too.
    one_mask = (input_ids == tokenizer.mask_token_id).sum() == 1
    return str(tokenizer.decode(filled, skip_special_tokens=bool(one_mask)))

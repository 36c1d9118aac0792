"""Top-k fills of masked tokens, by hand: what `pipeline("fill-mask")` does and returns.

    text -> ids -> one forward pass -> the logits at the mask -> softmax -> the k best -> sentences

`fill_mask` returns exactly what the pipeline returns, scores included; `walk_through` shows every
value on the way, as the second half of the tutorial does.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.hf.encode import ask, encode, find_masks, find_target_ids
from mlm_scratch.hf.load import check_no_nan
from mlm_scratch.util.errors import UserError


def fill_mask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | list[str],
    *,
    top_k: int = 5,
    targets: str | list[str] | None = None,
    truncate: bool = False,
    batch_size: int = 1,
) -> list:
    """Fill the masked tokens of one or several texts, each mask by itself.

    Args:
        model: a masked-LM, on any device; run in eval mode and left in the mode it was in.
        texts: text with one or more of the tokenizer's mask tokens, or a list of such.
        top_k: fills per mask, the most probable first; no more than there are targets.
        targets: consider these tokens only. Their scores stay shares of the whole vocabulary.
        truncate: cut texts that are too long, instead of raising UserError.
        batch_size: texts in one forward pass. More than one is for models that take no notice of
            padding (probe.py finds out); it still changes the last digits of the scores.

    Returns:
        for a text with one mask: a list of {"score", "token", "token_str", "sequence"}; with
        several masks: a list of such lists, one per mask; for several texts: a list of all that.
        A list of one text gives what the text alone gives.

    Raises:
        UserError: a text without a mask or too long for the model; top_k out of range; no usable
            target.

    Source: FillMaskPipeline of transformers, whose output this equals.
    """
    if top_k < 1 or (targets is None and top_k > model.config.vocab_size):
        raise UserError(f"top-k must be from 1 to {model.config.vocab_size}, got {top_k}")
    target_ids = None if targets is None else find_target_ids(tokenizer, targets)
    texts = [texts] if isinstance(texts, str) else texts
    fills = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        for input_ids, mask_index, probabilities in predict(model, tokenizer, batch, truncate):
            fills.append(
                _fill_one(tokenizer, input_ids, mask_index, probabilities, top_k, target_ids)
            )
    return fills[0] if len(fills) == 1 else fills


def _fill_one(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    mask_index: Tensor,
    probabilities: Tensor,
    top_k: int,
    target_ids: Tensor | None,
) -> list:
    if target_ids is not None:
        probabilities = probabilities[:, target_ids]  # (M, targets), not renormalised
        top_k = min(top_k, len(target_ids))
    scores, choices = probabilities.topk(top_k)  # (M, k), (M, k)
    tokens = choices if target_ids is None else target_ids[choices]  # (M, k)

    fills = []
    for index, mask_scores, mask_fills in zip(
        mask_index.tolist(), scores.tolist(), tokens.tolist(), strict=True
    ):
        fills.append(
            [
                {
                    "score": score,
                    "token": token,
                    "token_str": tokenizer.decode([token]),
                    "sequence": fill_in(tokenizer, input_ids, index, token),
                }
                for score, token in zip(mask_scores, mask_fills, strict=True)
            ]
        )
    return fills[0] if len(fills) == 1 else fills


def fill_in(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, index: int, token: int) -> str:
    """The sentence of input_ids, (T,), with `token` at `index`."""
    filled = input_ids.clone()  # (T,)
    filled[index] = token
    if tokenizer.pad_token_id is not None:
        filled = filled[filled != tokenizer.pad_token_id]
    # The other masks are to be seen, and as special tokens they go only with <s> and </s>.
    one_mask = (input_ids == tokenizer.mask_token_id).sum() == 1
    return str(tokenizer.decode(filled, skip_special_tokens=bool(one_mask)))


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    truncate: bool = False,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One forward pass over some texts. For each: its ids (T,), where its M masks are (M,), and the
    probability of every token of the vocabulary at each of them (M, V). All on the CPU.

    Raises UserError for a text without a mask, too long or not UTF-8, and for damaged weights.
    """
    inputs = encode(model, tokenizer, texts, truncate)  # (B, T) each
    logits = ask(model, inputs).cpu()  # (B, T, V)
    predictions = []
    for number, text in enumerate(texts):
        is_token = inputs["attention_mask"][number].bool()  # (T,), false at padding
        input_ids = inputs["input_ids"][number][is_token]  # (T,), its own
        mask_index = find_masks(tokenizer, input_ids, text)  # (M,)
        probabilities = logits[number][is_token][mask_index].softmax(dim=-1)  # (M, V)
        check_no_nan(probabilities)
        predictions.append((input_ids, mask_index, probabilities))
    return predictions


def walk_through(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    top_k: int = 5,
    truncate: bool = False,
) -> Iterable[str]:
    """Yield the lines of the same computation step by step, with the values on the way."""
    # (T,), (M,), (M, V)
    ((input_ids, mask_index, probabilities),) = predict(model, tokenizer, [text], truncate)
    yield f"input_ids   {input_ids.tolist()}"
    yield f"tokens      {tokenizer.convert_ids_to_tokens(input_ids.tolist())}"
    yield f"mask index  {mask_index.tolist()}"
    yield f"softmax     {tuple(probabilities.shape)}: for each mask, a probability per token"
    for index, row in zip(mask_index.tolist(), probabilities, strict=True):
        scores, tokens = row.topk(min(top_k, len(row)))  # (k,), (k,)
        yield f"top {top_k} at {index}  {tokens.tolist()}"
        for score, token in zip(scores.tolist(), tokens.tolist(), strict=True):
            yield f"  {score:<9.4g} {fill_in(tokenizer, input_ids, index, token)}"

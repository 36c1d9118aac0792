"""Chapter 6 (fill_mask.py) for users: check the inputs, and report a problem in one line."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch import fill_mask as chapter
from mlm_scratch.hf.checks import longest_input
from mlm_scratch.hf.encode import check_targets, encode, find_masks, refusals_reported


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
    """Fill the masked tokens of texts in eval mode; the model's mode is restored afterwards.

    Args:
        model: a masked-LM, on any device.
        tokenizer: its tokenizer.
        texts: as in the chapter, like the other arguments.
        top_k: fills per mask.
        targets: consider only these tokens.
        truncate: truncate texts that are too long instead of raising UserError.
        batch_size: above 1 only for models that ignore padding (hf/checks.py).

    Raises:
        UserError: a text without a mask, too long or not UTF-8; damaged weights; top_k out of
            range; no usable target.
    """
    for text in [texts] if isinstance(texts, str) else texts:
        (input_ids,) = encode(model, tokenizer, [text], truncate)["input_ids"]
        find_masks(tokenizer, input_ids, text)
    if targets is not None:
        check_targets(tokenizer, targets)
    with refusals_reported(model):
        return chapter.fill_mask(
            model,
            tokenizer,
            texts,
            top_k=top_k,
            targets=targets,
            max_length=longest_input(tokenizer, model) if truncate else None,
            batch_size=batch_size,
        )

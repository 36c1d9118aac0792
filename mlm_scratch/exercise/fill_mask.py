"""Exercise 6: fill masks as the pipeline does."""

import functools
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, RobertaConfig, RobertaForMaskedLM

from mlm_scratch import fill_mask as chapter
from mlm_scratch.data.corpus import unseen_sentences
from mlm_scratch.exercise.judging import Exercise, Wrong, close, equal
from mlm_scratch.hf.small_modernbert import train_tokenizer

START = '''"""Exercise 6: fill masks. Judge it with:

python -m mlm_scratch.exercise fill_mask my_fill_mask.py
"""

import torch


@torch.no_grad()
def fill_mask(model, tokenizer, text, top_k=5, targets=None):
    """Fill the masked tokens of a text, each mask by itself.

    Args:
        model: a masked-LM of transformers; called without dropout, and left in the mode it was in.
        tokenizer: its tokenizer, with mask_token and mask_token_id.
        text: with one or more masks.
        top_k: fills per mask, the most probable first.
        targets: consider only these tokens of the vocabulary. Their scores are not renormalised.

    Returns:
        for one mask a list of {"score", "token", "token_str", "sequence"}; for several masks a list
        of such lists, one per mask. "sequence" is the text with this mask filled.
    """
    # text -> ids -> logits (1, T, V) -> those at the mask, (V,) -> softmax -> the k best
    # With one mask the sequence is decoded without special tokens; with several they stay in it,
    # since the masks that are still there are special tokens, too.
    raise NotImplementedError
'''

TEXT = "The Milky Way is a <mask> galaxy."
SEVERAL = "The <mask> Way is a <mask> galaxy."


@functools.cache
def parts() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a small model with random weights and dropout, and its tokenizer."""
    tokenizer = train_tokenizer(sentence for sentence, _ in unseen_sentences())
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # clear preferences
    )
    return RobertaForMaskedLM(config).eval(), tokenizer


@functools.cache
def pipeline() -> Any:
    """Return the reference itself."""
    from transformers import pipeline

    model, tokenizer = parts()
    reference: Any = pipeline
    return reference("fill-mask", model=model, tokenizer=tokenizer)


def fills(solution: Any, text: str, top_k: int = 5, targets: list[str] | None = None) -> list:
    """Call the solution; check that a list comes back."""
    result = solution.fill_mask(*parts(), text, top_k, targets)
    if not isinstance(result, list) or not result:
        raise Wrong("a list of fills", f"{result!r:.60}")
    return result


def expected(text: str, top_k: int = 5, targets: list[str] | None = None) -> list:
    """Call the pipeline."""
    options = {} if targets is None else {"targets": targets}
    return list(pipeline()(text, top_k=top_k, **options))


def compare(came: list, wanted: list, what: str) -> None:
    """Raise Wrong unless the fills of one mask are the pipeline's."""
    equal(f"number of fills {what}", len(came), len(wanted))
    for place, (fill, reference) in enumerate(zip(came, wanted, strict=True), start=1):
        if not isinstance(fill, dict) or fill.keys() != reference.keys():
            keys = sorted(fill) if isinstance(fill, dict) else type(fill).__name__
            raise Wrong(f"fills with {sorted(reference)}", f"{keys}")
        for key in ("token", "token_str", "sequence"):
            equal(f"{key} of fill {place} {what}", repr(fill[key]), repr(reference[key]))
        close(f"score of fill {place} {what}", fill["score"], reference["score"])


class _Chapter:
    """The chapter, whose options have names."""

    @staticmethod
    def fill_mask(
        model: Any, tokenizer: Any, text: str, top_k: int = 5, targets: Any = None
    ) -> Any:
        """Call it."""
        return chapter.fill_mask(model, tokenizer, text, top_k=top_k, targets=targets)


EXERCISE = Exercise(
    task="fill_mask: the top-k fills of each mask of a text",
    lines=25,
    judged='by pipeline("fill-mask") on a small model with random weights',
    defines=("fill_mask",),
    start=START,
    twin=lambda solution: all(
        fills(solution, text) == chapter.fill_mask(*parts(), text) for text in (TEXT, SEVERAL)
    ),
    timed=lambda solution: fills(solution, TEXT),
    chapter=_Chapter,
)


@EXERCISE.check("the best fills come first, as many as top_k", "the largest logits at the mask")
def order(solution: Any) -> None:
    """Their ids, for several k."""
    for top_k in (1, 5, 20):
        came = [fill["token"] for fill in fills(solution, TEXT, top_k)]
        equal(f"ids of the {top_k} best", came, [fill["token"] for fill in expected(TEXT, top_k)])


@EXERCISE.check(
    "a score is a probability over the whole vocabulary",
    "a softmax over V numbers adds up to 1, the k best do not",
)
def score(solution: Any) -> None:
    """Not over the k best."""
    for fill, reference in zip(fills(solution, TEXT), expected(TEXT), strict=True):
        close(f"score of {reference['token_str']!r}", fill["score"], reference["score"])


@EXERCISE.check(
    "a fill has token_str, and the sequence with it in place", "decode, special ones out"
)
def one_mask(solution: Any) -> None:
    """All of the pipeline's keys."""
    compare(fills(solution, TEXT), expected(TEXT), "of one mask")


@EXERCISE.check(
    "the model runs without dropout, and keeps its mode", "eval, and back to what it was"
)
def mode(solution: Any) -> None:
    """In train mode the fills are the same."""
    model, _ = parts()
    wanted = expected(TEXT)
    for is_training in (True, False):
        model.train(is_training)
        try:
            compare(fills(solution, TEXT), wanted, "of a model in train mode")
            equal("training mode afterwards", model.training, is_training)
        finally:
            model.eval()


@EXERCISE.check("several masks give a list for each", "each predicted with all of them masked")
def several(solution: Any) -> None:
    """Special tokens stay in the sequences, with the other masks."""
    came, wanted = fills(solution, SEVERAL), expected(SEVERAL)
    equal("number of lists", len(came), 2)
    for number, (own, reference) in enumerate(zip(came, wanted, strict=True), start=1):
        if not isinstance(own, list):
            raise Wrong("a list of fills for each mask", type(own).__name__)
        compare(own, reference, f"of mask {number}")


WORDS = ["Ġrocky", "Ġred", "Ġthe", "Ġplanet"]


def targets() -> list[str]:
    """Return targets, the least probable first."""
    tokens = [fill["token"] for fill in expected(TEXT, targets=WORDS)]
    return [str(token) for token in parts()[1].convert_ids_to_tokens(tokens[::-1])]


@EXERCISE.check("targets alone are considered, in the order of their scores", "and their own ids")
def targets_alone(solution: Any) -> None:
    """Fewer than top_k of them."""
    came = fills(solution, TEXT, targets=targets())
    wanted = expected(TEXT, targets=targets())
    equal("ids", [fill["token"] for fill in came], [fill["token"] for fill in wanted])
    compare(fills(solution, TEXT, 2, targets()), expected(TEXT, 2, targets()), "among targets")
    of_masks = fills(solution, SEVERAL, targets=targets())
    for own, reference in zip(of_masks, expected(SEVERAL, targets=targets()), strict=True):
        compare(own, reference, "of several masks, among targets")


@EXERCISE.check("scores of targets are not renormalised", "they are still shares of the vocabulary")
def not_renormalised(solution: Any) -> None:
    """They do not add up to 1."""
    compare(
        fills(solution, TEXT, targets=targets()), expected(TEXT, targets=targets()), "among targets"
    )

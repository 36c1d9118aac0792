"""fill_mask returns what pipeline("fill-mask") returns: the same fills, the same scores."""

import pytest
from transformers import BertForMaskedLM, FillMaskPipeline

from mlm_scratch import fill_mask as chapter
from mlm_scratch.hf.encode import use_own_mask
from mlm_scratch.inference.fill import fill_mask
from mlm_scratch.util.errors import UserError
from tests.support.tiny import bert_config, byte_level_tokenizer, roberta, wordpiece_tokenizer

BPE, WORDPIECE = byte_level_tokenizer(), wordpiece_tokenizer()
BERT = BertForMaskedLM(bert_config(vocab_size=len(WORDPIECE)))
MODELS = {"RoBERTa": (roberta(BPE).eval(), BPE), "BERT": (BERT.eval(), WORDPIECE)}
ONE = "The Milky Way is a <mask> galaxy."
CASES = {
    "one mask": (ONE, {}),
    "several masks": ("The <mask> Way is a <mask> galaxy.", {}),
    "several texts": ([ONE, "Paris is the <mask> of <mask>.", "<mask>"], {}),
    "a list of one": ([ONE], {}),
    "top 1": (ONE, {"top_k": 1}),
    "top 20": (["<mask> " + ONE, ONE], {"top_k": 20}),
    "a target": (ONE, {"targets": "is"}),
    "targets, one twice, one with a space, one in pieces": (
        ONE,
        {"targets": ["the", " capital", "the", "misunderstandings", "is"]},
    ),
    "fewer fills than targets": (ONE, {"targets": ["the", "is", "of"], "top_k": 2}),
    "more fills than targets": ("<mask> and <mask>", {"targets": ["the", "is"], "top_k": 1000}),
}


def test_a_model_that_outputs_nan_is_an_error():
    """Topk would order NaN as the best."""
    model = roberta(BPE).eval()
    model.lm_head.bias.data[7] = float("nan")
    with pytest.raises(chapter.FillError, match="the model outputs NaN"):
        chapter.fill_mask(model, BPE, ONE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_pipeline(name, case):
    model, tokenizer = MODELS[name]
    texts, options = CASES[case]
    own = lambda text: use_own_mask(tokenizer, text)  # noqa: E731
    texts = own(texts) if isinstance(texts, str) else [own(text) for text in texts]
    pipeline = FillMaskPipeline(model=model, tokenizer=tokenizer)
    for fill in (chapter.fill_mask, fill_mask):
        assert fill(model, tokenizer, texts, **options) == pipeline(texts, **options)


def test_a_model_in_train_mode_fills_without_dropout_and_stays_in_it():
    model, tokenizer = roberta(BPE), BPE
    expected = fill_mask(model.eval(), tokenizer, ONE)
    assert fill_mask(model.train(), tokenizer, ONE) == expected
    assert model.training


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("nothing to fill", {}, "no <mask> in the text 'nothing to fill'"),
        ("", {}, "no <mask> in the text ''"),
        ("a " * 100 + "<mask>", {}, "the model takes 64"),
        (ONE, {"top_k": 0}, "top-k must be from 1 to 320"),
        (ONE, {"top_k": 321}, "top-k must be from 1 to 320"),
        ("\udcff <mask>", {}, "is not UTF-8"),
        (ONE, {"targets": [""]}, "none of the targets"),
        (ONE, {"targets": []}, "none of the targets"),
    ],
)
def test_what_cannot_be_filled_is_reported(text, options, message):
    with pytest.raises(UserError, match=message):
        fill_mask(*MODELS["RoBERTa"], text, **options)


def test_both_spellings_of_the_mask_become_the_tokenizers_own():
    assert use_own_mask(BPE, "a [MASK] and a <mask>") == "a <mask> and a <mask>"
    assert use_own_mask(WORDPIECE, "a [MASK] and a <mask>") == "a [MASK] and a [MASK]"


@pytest.mark.cuda
def test_fills_on_a_gpu_are_those_on_a_cpu():
    model, tokenizer = roberta(BPE).eval(), BPE
    expected = fill_mask(model, tokenizer, ONE)
    for fill, other in zip(expected, fill_mask(model.cuda(), tokenizer, ONE), strict=True):
        assert fill["score"] == pytest.approx(other["score"], rel=1e-3)
        assert fill["token"] == other["token"]

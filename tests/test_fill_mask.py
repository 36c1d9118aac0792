"""fill_mask returns what pipeline("fill-mask") returns: the same fills, the same scores."""

import pytest
from transformers import BertConfig, BertForMaskedLM, FillMaskPipeline

from mlm_scratch.fill_mask import fill_mask, walk_through
from mlm_scratch.hf.encode import use_own_mask
from mlm_scratch.util.errors import UserError
from tests.support.tiny import byte_level_tokenizer, roberta, wordpiece_tokenizer


def bert(tokenizer):
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )


BPE, WORDPIECE = byte_level_tokenizer(), wordpiece_tokenizer()
MODELS = {"RoBERTa": (roberta(BPE).eval(), BPE), "BERT": (bert(WORDPIECE).eval(), WORDPIECE)}
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
    "more fills than targets": ("<mask> and <mask>", {"targets": ["the", "is"], "top_k": 1000}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_pipeline(name, case):
    model, tokenizer = MODELS[name]
    texts, options = CASES[case]
    own = lambda text: use_own_mask(tokenizer, text)  # noqa: E731
    texts = own(texts) if isinstance(texts, str) else [own(text) for text in texts]
    reference = FillMaskPipeline(model=model, tokenizer=tokenizer)
    assert fill_mask(model, tokenizer, texts, **options) == reference(texts, **options)


def test_a_model_in_training_is_asked_without_dropout_and_goes_on_training():
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
def test_what_cannot_be_filled_is_said(text, options, message):
    with pytest.raises(UserError, match=message):
        fill_mask(*MODELS["RoBERTa"], text, **options)


def test_both_spellings_of_the_mask():
    assert use_own_mask(BPE, "a [MASK] and a <mask>") == "a <mask> and a <mask>"
    assert use_own_mask(WORDPIECE, "a [MASK] and a <mask>") == "a [MASK] and a [MASK]"


def test_step_by_step_shows_the_same_fills():
    model, tokenizer = MODELS["RoBERTa"]
    lines = "\n".join(walk_through(model, tokenizer, ONE, top_k=3))
    assert str(tokenizer(ONE)["input_ids"]) in lines
    for fill in fill_mask(model, tokenizer, ONE, top_k=3):
        assert f"{fill['score']:<9.4g} {fill['sequence']}" in lines
    for mask_fills in fill_mask(model, tokenizer, CASES["several masks"][0], top_k=2):
        lines = "\n".join(walk_through(model, tokenizer, CASES["several masks"][0], top_k=2))
        assert all(fill["sequence"] in lines for fill in mask_fills)


@pytest.mark.cuda
def test_fills_on_a_gpu_are_those_on_a_cpu():
    model, tokenizer = roberta(BPE).eval(), BPE
    expected = fill_mask(model, tokenizer, ONE)
    for fill, other in zip(expected, fill_mask(model.cuda(), tokenizer, ONE), strict=True):
        assert fill["score"] == pytest.approx(other["score"], rel=1e-3)
        assert fill["token"] == other["token"]

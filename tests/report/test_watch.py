"""Watched sentences: what is masked, what is shown, and that watching changes nothing."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers.normalizers import NFKC, Sequence
from torch.nn.functional import one_hot
from transformers import BertForMaskedLM, BertTokenizer

from mlm_scratch.fill_mask import fill_mask
from mlm_scratch.hf.encode import visible_token
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.report.watch import fill_watched, read_watched, short, watched_line
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from tests.hf.test_new_words import sentencepiece, sentencepiece_with_its_mask_outside
from tests.support.tiny import (
    bert_config,
    byte_level_tokenizer,
    roberta,
    small_config,
    wordpiece_tokenizer,
)

LETTERS_OF = set("chloroplasts")
SPIRAL = "The Milky Way is a [spiral] galaxy."


def fill(texts, model, tokenizer):
    return fill_watched(model, tokenizer, read_watched(texts, model, tokenizer))


def test_fills_and_answers_equal_fill_mask():
    """With <mask> or [MASK], whatever the tokenizer's own is; with an answer of one token."""
    for tokenizer in (byte_level_tokenizer(), wordpiece_tokenizer()):
        if tokenizer.mask_token == "<mask>":
            model = roberta(tokenizer)
        else:
            model = BertForMaskedLM(bert_config())
        mask = tokenizer.mask_token
        masked = f"Water {mask} the heart."
        (best,) = fill_mask(model, tokenizer, masked, top_k=1)
        (target,) = fill_mask(
            model, tokenizer, masked, targets=["Ġis" if mask == "<mask>" else "is"]
        )
        first, second, third = fill(
            ("Water <mask> the heart.", "Water [MASK] the heart.", "Water [is] the heart."),
            model,
            tokenizer,
        )
        for each in (first, second, third):
            spelled = best["token_str"].strip() or visible_token(best["token"], tokenizer)
            assert each["fill"] == spelled
            assert each["p"] == pytest.approx(best["score"])
        assert "answer" not in first and "answer" not in second
        assert third["answer"] == "is"
        assert third["answer_p"] == pytest.approx(target["score"])


def test_an_answer_of_several_tokens_gets_as_many_masks():
    tokenizer = wordpiece_tokenizer()
    model = BertForMaskedLM(bert_config())
    (each,) = fill(("Water is [unbelievable] and a heart.",), model, tokenizer)
    text = "Water is [MASK] [MASK] [MASK] and a heart."
    pieces = ["un", "##believ", "##able"]
    of_masks = fill_mask(model, tokenizer, text, top_k=50)
    p = [
        next(fill["score"] for fill in fills if fill["token"] == id)
        for fills, id in zip(of_masks, tokenizer.convert_tokens_to_ids(pieces), strict=True)
    ]
    assert each["answer_p"] == pytest.approx(math.prod(p))
    assert each["p"] == pytest.approx(math.prod(fills[0]["score"] for fills in of_masks))


def uncased_with_normalization():
    """Lower case, NFKC, numbers and abbreviations cut at every sign."""
    words = ["the", "capital", "is", "paris", "rome", "u", "s", "3", "000", "fish", ".", ","]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(
        vocab={token: id for id, token in enumerate([*special, *words])}, do_lower_case=True
    )
    backend = tokenizer.backend_tokenizer
    backend.normalizer = Sequence([NFKC(), backend.normalizer])
    return tokenizer


@pytest.mark.parametrize(
    "answer, tokens",
    [
        ("Paris", ["paris"]),
        ("ROME", ["rome"]),
        (" Rome ", ["rome"]),
        ("Rome ", ["rome"]),
        ("U.S.", ["u", ".", "s", "."]),
        ("3,000", ["3", ",", "000"]),
        ("\N{LATIN SMALL LIGATURE FI}sh", ["fish"]),
    ],
)
def test_the_ids_decide_whether_a_fill_is_right(answer, tokens, monkeypatch):
    """Not its spelling, in which an uncased or normalizing tokenizer cannot answer."""
    tokenizer = uncased_with_normalization()
    model = BertForMaskedLM(bert_config(vocab_size=len(tokenizer)))
    ids = tokenizer.convert_tokens_to_ids(tokens)
    the = tokenizer.vocab["the"]
    for wanted, right in ((ids, True), ([the] * len(ids), False), ([*ids[:-1], the], False)):
        logits = one_hot(torch.tensor([wanted]), len(tokenizer)).float()  # (1, M, V)
        monkeypatch.setattr("mlm_scratch.report.watch.logits_at", lambda *_, logits=logits: logits)
        (each,) = fill((f"The capital is [{answer}]",), model, tokenizer)
        assert each["right"] == right and short(each).endswith(": right") == right
        assert each["answer"] == answer.strip()


def test_an_answer_outside_the_vocabulary_is_refused():
    """Else every word that the tokenizer does not know would be right."""
    tokenizer = wordpiece_tokenizer()
    with pytest.raises(UserError, match="'whale' is not in the vocabulary of this tokenizer"):
        read_watched(("The [whale] is",), BertForMaskedLM(bert_config()), tokenizer)


def test_a_space_inside_the_brackets_stays_in_the_sentence():
    tokenizer = byte_level_tokenizer()
    model = roberta(tokenizer)
    shown = [
        tokenizer.decode(each.input_ids.index_put((each.at,), each.answer_ids))
        for each in read_watched(("A[ heart] is", "A [ heart ] is", "A [heart]."), model, tokenizer)
    ]
    assert shown == ["<s>A heart is</s>", "<s>A heart is</s>", "<s>A heart.</s>"]


def test_a_fill_without_letters_is_named():
    """An id beyond the tokenizer's, and a token that is a space."""
    tokenizer = byte_level_tokenizer()
    model = roberta(tokenizer, vocab_size=len(tokenizer) + 8)
    for id, shown in ((len(tokenizer) + 3, f"#{len(tokenizer) + 3}"), (tokenizer.vocab["Ġ"], "Ġ")):
        model.lm_head.bias.data.zero_()[id] = 50
        assert fill((SPIRAL,), model, tokenizer)[0]["fill"].split()[0] == shown


def test_a_model_that_outputs_nan_fills_nothing(files):
    model, tokenizer = load_model(files / "model"), load_tokenizer(files / "model")
    model.lm_head.bias.data.fill_(math.nan)
    (each,) = fill((SPIRAL,), model, tokenizer)
    assert each["fill"] == "" and not each["right"]
    assert watched_line(each) == f"    {SPIRAL}  no fill: the model outputs NaN"


@pytest.mark.parametrize("kind", [sentencepiece, sentencepiece_with_its_mask_outside])
def test_the_answers_own_tokens_are_masked(kind):
    """Where a sentence with a mask in it would have other tokens around: a space after the mask."""
    tokenizer, model = kind()
    model.eval()
    (each,) = fill(("The [chloroplasts].",), model, tokenizer)
    ids = tokenizer("The chloroplasts.", return_tensors="pt")["input_ids"]  # (1, T)
    at = [i for i, word in enumerate(tokenizer.convert_ids_to_tokens(ids[0])) if word in LETTERS_OF]
    masked = ids.clone()
    masked[0, at] = tokenizer.mask_token_id
    with torch.no_grad():
        p = model(masked).logits[0, at].softmax(dim=-1)  # (M, V)
    expected = p.gather(1, ids[0, at, None]).prod().item()
    assert each["answer_p"] == pytest.approx(expected, rel=1e-4) and len(at) > 5


def test_the_line_says_whether_it_is_right():
    answer = {"answer": "spiral", "answer_p": 0.98, "right": True}
    right = {"text": SPIRAL, "fill": "spiral", "p": 0.98, **answer}
    assert watched_line(right) == f"    {SPIRAL}  spiral (0.98): right"
    wrong = right | {"fill": "the", "p": 0.31, "answer_p": 0.00123, "right": False}
    assert watched_line(wrong) == f"    {SPIRAL}  the (0.31), not spiral (0.0012)"
    assert watched_line({"text": "A <mask>.", "fill": "b", "p": 0.5}) == "    A <mask>.  b (0.50)"


@pytest.mark.parametrize(
    "text, message",
    [
        ("no gap at all", "no <mask> in the text 'no gap at all'"),
        ("A <mask>\nb", "is not printable text in one line"),
        ("[two] of [them]", "put one answer in brackets in '\\[two\\] of \\[them\\]', not 2"),
        ("T[h]e Milky Way", "'h' is not a separate word to this tokenizer"),
        ("long " * 80 + "<mask>", "the model takes 64"),
    ],
)
def test_what_cannot_be_watched_is_reported_before_the_run(files, text, message):
    with pytest.raises(UserError, match=message):
        train(small_config(files, watch=(text,), output_dir="run"))


def test_sentences_are_watched_from_before_the_first_step(files, capsys):
    """With and without held-out text; no random state moves by it."""
    sentences = (SPIRAL, "Paris is the <mask> of France.")
    settings = {"eval_every": 5, "max_steps": 12, "log_every": 1}
    plain = train(small_config(files, **settings))
    capsys.readouterr()
    run_dir = train(small_config(files, watch=sentences, **settings))
    lines = [line for line in read_metrics(run_dir) if "watch" in line]
    assert [line["step"] for line in lines] == [0, 5, 10, 12]
    assert [line for line in read_metrics(run_dir) if "loss" in line] == read_metrics(plain)
    tokenizer = load_tokenizer(run_dir / "model")
    for line, directory in ((lines[0], files / "model"), (lines[-1], run_dir / "model")):
        expected = fill(sentences, load_model(directory), tokenizer)
        for each, value in zip(line["watch"], expected, strict=True):
            assert each == pytest.approx(value)
    out = capsys.readouterr().out
    assert f"step 5:\n{watched_line(lines[1]['watch'][0])}\n" in out
    assert "fills after 0 steps, and after 12:\n" + watched_line(lines[0]["watch"][0]) in out
    curves = EventAccumulator(str(run_dir / "logs")).Reload()
    values = [event.value for event in curves.Scalars(f"watch/{SPIRAL}")]
    assert values == pytest.approx([line["watch"][0]["answer_p"] for line in lines])

    held_out = settings | {"eval_fraction": 0.2, "no_eval_first": True}
    later = read_metrics(train(small_config(files, watch=sentences, **held_out)))
    assert [line["step"] for line in later if "watch" in line] == [5, 10, 12]
    assert [line["step"] for line in later if "eval_loss" in line] == [5, 10, 12]


def test_a_resume_may_watch_other_sentences(files, capsys):
    """Also with signs that a picture could take for a formula, and none before."""
    run_dir = train(small_config(files, max_steps=4, eval_every=2, output_dir="run"))
    watch = ("Of $5 the [heart] #1 is $6", "_Water <mask>_")
    train(resumed_config("run", {"watch": watch, "max_steps": 6}), resume=True)
    assert "fills after 4 steps, and after 6:\n    Of $5 the [heart]" in capsys.readouterr().out
    train(resumed_config("run", {"watch": (watch[1], SPIRAL), "max_steps": 8}), resume=True)
    assert r"\_Water \<mask\>\_" in (run_dir / "model/README.md").read_text()
    results = json.loads((run_dir / "results.json").read_text())
    train(resumed_config("run", {}), resume=True)  # once more, without a step
    again = json.loads((run_dir / "results.json").read_text())
    assert again["seconds"] == results["seconds"] and again["steps"] == 2
    (run_dir / "results.json").write_text("[]")  # cut short, perhaps
    train(resumed_config("run", {}), resume=True)
    assert json.loads((run_dir / "results.json").read_text())["after"] == results["after"]

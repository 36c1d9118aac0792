"""What explain prints is what the loop computes."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from mlm_scratch import loop
from mlm_scratch.explain import __main__ as explain
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.loop import train
from mlm_scratch.model import MaskedLM
from mlm_scratch.run.metrics import read_metrics
from tests.support.tiny import byte_level_tokenizer, save_roberta, small_config

TEXT = "Paris is the capital of France, and Rome is the capital of Italy."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without dropout, and a text of this one sentence."""
    directory = tmp_path_factory.mktemp("files")
    torch.manual_seed(1)
    save_roberta(directory / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (directory / "a.txt").write_text(TEXT)
    return directory


def test_the_loss_it_adds_up_is_that_of_the_step(files, call):
    """Of a run whose first step is this sentence. Seed 1 has all three fates."""
    arguments = ["--model", files / "model", "--seed", 1, "--mlm-probability", 0.5]
    code, out, _ = call(explain, *arguments, TEXT)
    assert code == 0 and {"mask", "random", "keep"} <= set(out.split())
    run = train(
        small_config(
            files,
            grouping="lines",
            block_size=64,
            max_steps=1,
            log_every=1,
            seed=1,
            mlm_probability=0.5,
        )
    )
    loss = read_metrics(run)[0]["loss"]
    assert out.rstrip().endswith(f" = {loss:.4g} nats")
    terms = [float(term) for term in re.findall(r"loss = -ln p = ([0-9.]+)", out)]
    assert len(terms) > 3 and sum(terms) / len(terms) == pytest.approx(loss, abs=5e-4)  # as rounded
    for p, term in re.findall(r"p\(.+?\) = ([0-9.e-]+), loss = -ln p = ([0-9.]+)", out):
        assert -math.log(float(p)) == pytest.approx(float(term), abs=5e-4)


def test_the_table_is_what_the_reference_collator_makes(files):
    tokenizer = load_tokenizer(files / "model")
    config = small_config(files, block_size=64, seed=1, mlm_probability=0.5)
    model = load_model(files / "model")
    explanation = explain.explain(MaskedLM(model), tokenizer, TEXT, config)
    reference = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=1)
    batch = reference([tokenizer(TEXT)])
    seen_ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    name = tokenizer.convert_ids_to_tokens
    expected = []
    for position, (id, seen, label) in enumerate(
        zip(tokenizer(TEXT)["input_ids"], seen_ids, labels, strict=True)
    ):
        fate = "mask" if seen == tokenizer.mask_token_id else "keep" if seen == id else "random"
        special = "yes" if id in tokenizer.all_special_ids else ""
        asked = ("", "—", name(seen), "") if label == -100 else ("yes", fate, name(seen), name(id))
        expected.append((str(position), name(id), str(id), special, *asked))
    assert [explain.cells(token, tokenizer) for token in explanation.tokens] == expected
    assert {"mask", "random", "keep"} <= {row[5] for row in expected}

    with torch.no_grad():
        logits = model.eval()(batch["input_ids"]).logits[0]  # (T, V)
    for guess in explanation.guesses:
        best = logits[guess.token.position].softmax(dim=-1).topk(3)
        assert [id for id, _ in guess.top] == best.indices.tolist()
        assert [p for _, p in guess.top] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_a_run_begins_by_showing_its_first_row(files, monkeypatch, capsys):
    step, rows = loop.masked_lm_loss, []

    def noted(net, input_ids, attention_mask, labels, **kwargs):
        rows.append((input_ids[0].tolist(), labels[0].tolist()))
        return step(net, input_ids, attention_mask, labels, **kwargs)

    monkeypatch.setattr(loop, "masked_lm_loss", noted)
    settings = small_config(files, grouping="lines", block_size=64, max_steps=1, seed=1)
    train(replace(settings, mlm_probability=0.5))
    out, tokenizer = capsys.readouterr().out, load_tokenizer(files / "model")
    input_ids, labels = rows[0]
    for name, ids in (("model sees", input_ids), ("label", labels)):
        shown = re.search(rf"^  {name} +(.*)$", out, re.M)[1].split()
        assert shown == [
            "·" if id == -100 else tokenizer.convert_ids_to_tokens(id) for id in ids[:12]
        ]


def test_colour_is_for_terminals_and_the_page_says_the_same(files, call, monkeypatch):
    arguments = ["--model", files / "model", "--seed", 1, "--mlm-probability", 0.5, TEXT]
    _, plain, _ = call(explain, *arguments)
    assert "\033" not in plain
    _, said, _ = call(explain, *arguments, "--html", "page.html")
    page = Path("page.html").read_text()
    assert "page.html" in said
    table, _, _ = plain.partition("\n\n")
    assert page.count("<tr class") == len(table.splitlines()) - 2  # without seed and titles
    for line in plain.splitlines():
        for number in re.findall(r"[0-9]+\.[0-9]+", line):
            assert number in page
    assert plain.splitlines()[0] in page  # seed and share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout.isatty", lambda: True)
        patch.delenv("NO_COLOR", raising=False)
        _, colourful, _ = call(explain, *arguments)
        patch.setenv("NO_COLOR", "1")
        assert call(explain, *arguments)[1] == plain
    assert re.sub("\033\\[[0-9]*m", "", colourful) == plain != colourful


def test_every_id_has_a_name_that_can_be_seen():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["\n", " "])
    names = [explain.name_of(id, tokenizer) for id in (4, 320, 321, 322)]
    assert names == ["<mask>", r"'\n'", "' '", "#322"]


def test_a_page_shows_markup_as_text(files, call):
    call(explain, "--model", files / "model", "--html", "page.html", "<b>&</b>")
    assert "<h1>&lt;b&gt;&amp;&lt;/b&gt;</h1>" in Path("page.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "there is no token to mask in the text"),
        ([" "], "there is no token to mask in the text"),
        (["caf\udce9"], "is not UTF-8"),
        (["galaxy " * 99], "the model takes 64"),
        (["--mlm-probability", 2, TEXT], "--mlm-probability must be at most 1"),
        (["--seed", -1, TEXT], "--seed must be at least 0"),
        (["--html", "missing/page.html", TEXT], "--html: cannot write missing/page.html"),
        ([], "the following arguments are required: text"),
    ],
)
def test_bad_input_is_one_line(files, call, arguments, message):
    code, _, err = call(explain, "--model", files / "model", *arguments)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err

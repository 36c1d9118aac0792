"""explain prints what the collator draws and the loop computes."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from mlm_scratch.explain import __main__ as explain_main
from mlm_scratch.explain.render import cells
from mlm_scratch.explain.trace import trace
from mlm_scratch.hf.encode import visible_token
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.model import MaskedLM
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run.session import train
from tests.support.tiny import NO_DROPOUT, byte_level_tokenizer, save_files, small_config

TEXT = "Paris is the capital of France, and Rome is the capital of Italy."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without dropout, and this text alone."""
    return save_files(tmp_path_factory.mktemp("files"), [TEXT], **NO_DROPOUT)


def test_the_loss_is_that_of_the_step(files, call):
    """Of a run whose first step is this text. Seed 1 has all three treatments."""
    arguments = ["--model", files / "model", "--seed", 1, "--mlm-probability", 0.5]
    code, out, _ = call(explain_main, *arguments, TEXT)
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


def test_the_table_shows_what_the_collator_does(files):
    tokenizer = load_tokenizer(files / "model")
    config = small_config(files, block_size=64, seed=1, mlm_probability=0.5)
    model = load_model(files / "model")
    result = trace(MaskedLM(model), tokenizer, TEXT, config)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=1)
    batch = collator([tokenizer(TEXT)])
    seen_ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    name = tokenizer.convert_ids_to_tokens
    expected = []
    for position, (id, seen, label) in enumerate(
        zip(tokenizer(TEXT)["input_ids"], seen_ids, labels, strict=True)
    ):
        treatment = (
            "mask" if seen == tokenizer.mask_token_id else "keep" if seen == id else "random"
        )
        special = "yes" if id in tokenizer.all_special_ids else ""
        masked = (
            ("", "—", name(seen), "") if label == -100 else ("yes", treatment, name(seen), name(id))
        )
        expected.append((str(position), name(id), str(id), special, *masked))
    assert [cells(token, tokenizer) for token in result.tokens] == expected
    assert {"mask", "random", "keep"} <= {row[5] for row in expected}

    with torch.no_grad():
        logits = model.eval()(batch["input_ids"]).logits[0]  # (T, V)
    for prediction in result.predictions:
        best = logits[prediction.token.position].softmax(dim=-1).topk(3)
        assert [id for id, _ in prediction.top] == best.indices.tolist()
        assert [p for _, p in prediction.top] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_colour_is_for_terminals_and_the_page_has_the_same_numbers(files, call, monkeypatch):
    arguments = ["--model", files / "model", "--seed", 1, "--mlm-probability", 0.5, TEXT]
    _, plain, _ = call(explain_main, *arguments)
    assert "\033" not in plain
    _, printed, _ = call(explain_main, *arguments, "--html", "page.html")
    page = Path("page.html").read_text()
    assert "page.html" in printed
    table, _, _ = plain.partition("\n\n")
    assert page.count("<tr class") == len(table.splitlines()) - 2  # minus seed and column names
    for line in plain.splitlines():
        for number in re.findall(r"[0-9]+\.[0-9]+", line):
            assert number in page
    assert plain.splitlines()[0] in page  # seed and share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout.isatty", lambda: True)
        patch.delenv("NO_COLOR", raising=False)
        _, colourful, _ = call(explain_main, *arguments)
        patch.setenv("NO_COLOR", "1")
        assert call(explain_main, *arguments)[1] == plain
    assert re.sub("\033\\[[0-9]*m", "", colourful) == plain != colourful


def test_every_id_has_a_visible_name():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["\n", " "])
    names = [visible_token(id, tokenizer) for id in (4, 320, 321, 322)]
    assert names == ["<mask>", r"'\n'", "' '", "#322"]


def test_a_page_shows_markup_as_text(files, call):
    call(explain_main, "--model", files / "model", "--html", "page.html", "<b>&</b>")
    assert "<h1>&lt;b&gt;&amp;&lt;/b&gt;</h1>" in Path("page.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "there is no token to mask in the text"),
        ([" "], "there is no token to mask in the text"),
        (["caf\udce9"], "is not UTF-8"),
        (["galaxy " * 99], "the model takes 64"),
        (["--mlm-probability", 2, TEXT], "--mlm-probability must be above 0 and at most 1"),
        (["--seed", -1, TEXT], "--seed must be at least 0"),
        (["--html", "missing/page.html", TEXT], "--html: cannot write missing/page.html"),
        ([], "the following arguments are required: text"),
    ],
)
def test_bad_input_is_reported_in_one_line(files, call, arguments, message):
    code, _, err = call(explain_main, "--model", files / "model", *arguments)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err

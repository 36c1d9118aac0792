"""What infer.py prints: many texts, targets, truncated texts, joint fills, scores."""

import json
import math
import re

import pytest

import infer
from mlm_scratch.fill_mask import fill_mask
from mlm_scratch.hf import encode
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.inference.joint import ORDERS, fill_jointly
from mlm_scratch.inference.output import harmless

TEXT = "The <mask> Way is a <mask> galaxy."


@pytest.fixture
def directory(files):
    """A model for inputs of up to 64 tokens."""
    return files / "model"


def test_many_lines_have_the_fills_of_single_texts(directory, call, rows_of_each_pass):
    lines = [f"{'very ' * (i % 4)}old <mask> {i}" for i in range(20)]
    code, out, err = call(infer, "--model", directory, "--top-k", 2, stdin="\n".join(lines))
    assert code == 0 and "texts" in err  # the progress bar
    assert rows_of_each_pass[-3:] == [8, 8, 4]
    for line, fills in zip(lines, out.strip().split("\n\n"), strict=True):
        _, alone, _ = call(infer, "--model", directory, "--top-k", 2, line)
        alone, _, _ = alone.partition("\n\nstep by step")
        for one, other in zip(fills.splitlines()[1:], alone.splitlines()[1:], strict=True):
            (score, *words), (score_alone, *words_alone) = one.split(), other.split()
            assert words == words_alone
            assert float(score) == pytest.approx(float(score_alone), rel=1e-3)


def test_what_a_terminal_would_obey_is_spelled_out(directory, call):
    title = "a \33]0;title\7 <mask>"
    code, out, _ = call(infer, "--model", directory, "--targets", "\33", "--", title)
    text, fill, *_ = out.splitlines()
    assert code == 0 and text == "a \\x1b]0;title\\x07 <mask>"
    assert fill.endswith("a \\x1b]0;title\\x07\\x1b")
    assert "\33" not in out and "\7" not in out


def test_a_target_after_a_space_includes_it_except_in_json(directory, call):
    encode._warn_once.cache_clear()  # other tests may have caused the same warning
    arguments = ["--model", directory, "The Milky Way <mask> a galaxy.", "--targets", "is"]
    _, out, _ = call(infer, *arguments)
    assert "' is'" in out.splitlines()[1]
    _, out, _ = call(infer, *arguments, "--json")
    assert json.loads(out)[0]["token_str"] == "is"
    _, out, err = call(infer, *arguments[:3], arguments[2], "--targets", "of", "offside")
    assert err.count("target ' offside' is not one token, taking ' of'") == 1  # for both texts
    assert out.count("' of'") == 2 and "step by step" not in out  # it would show other tokens
    _, out, _ = call(infer, "--model", directory, "A <mask> (<mask>) way.", "--targets", "is")
    first, second = re.findall(r"  '.*?is'", out)
    assert (first, second) == ("  ' is'", "  'is'")
    _, out, _ = call(
        infer,
        "--model",
        directory,
        "--truncate",
        "A <mask>" + " (<mask>) is" * 99,
        "--targets",
        "is",
    )
    assert "mask 12" in out and "mask 99" not in out


def test_a_long_text_is_truncated_only_with_the_flag(directory, call):
    text = "<mask> " + "galaxy " * 99
    code, _, err = call(infer, "--model", directory, text)
    assert code == 2
    assert "the model takes 64: shorten it, or let infer.py cut it with --truncate" in err
    for what in ([], ["--json"], ["--joint"], ["--score"]):
        scored = text.replace("<mask>", "A") if what == ["--score"] else text
        code, out, _ = call(infer, "--model", directory, "--truncate", *what, scored)
        assert code == 0 and out


def test_joint_and_score_print_their_results(directory, call):
    _, out, _ = call(infer, "--model", directory, "--joint", "--top-k", 2, TEXT)
    tokenizer, model = load_tokenizer(directory), load_model(directory).eval()
    for order in ORDERS:
        shown = out.split(f"  {order}\n")[1].splitlines()[:2]
        fills = fill_jointly(model, tokenizer, TEXT, order, top_k=2)
        for line, fill in zip(shown, fills, strict=True):
            assert float(line.split()[0]) == pytest.approx(fill.score, rel=1e-3)
            assert line.endswith(harmless(fill.sequence))
    _, out, _ = call(infer, "--model", directory, "--score", "The Milky Way is a spiral galaxy.")
    *tokens, total = out.splitlines()[1:-1]
    scores = [float(line.split()[0]) for line in tokens]
    assert float(total.split()[0]) == pytest.approx(sum(scores), abs=1e-2)
    perplexity = math.exp(-sum(scores) / len(scores))
    assert float(total.split()[-1]) == pytest.approx(perplexity, rel=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--joint", ""], "write it where a word is missing"),
        (["--score", ""], "has no token to score"),
        (["--score", TEXT], "has a mask"),
        (["--joint", "--top-k", 0, TEXT], "top-k must be from 1 to 100"),
        (["--joint", TEXT, "--targets", "is"], "--targets does not go with --joint"),
        (["--joint", "--score", TEXT], "not allowed with argument"),
        (["--truncate", "galaxy " * 99 + "<mask>"], "in the text 'galaxy galaxy"),
        ([TEXT, "no gap"], "text 2: no <mask> in the text 'no gap'"),
        (["--score", "words", "<mask>"], "text 2: the text '<mask>' has a mask"),
    ],
)
def test_what_cannot_be_filled_or_scored_is_reported_in_one_line(
    directory, call, arguments, message
):
    code, out, err = call(infer, "--model", directory, *arguments)
    assert code == 2 and message in err.splitlines()[-1] and out == ""


def test_step_by_step_shows_the_same_fills(directory, call):
    tokenizer, model = load_tokenizer(directory), load_model(directory).eval()
    for text in ("The Milky Way is a <mask> galaxy.", TEXT):
        _, out, _ = call(infer, "--model", directory, "--top-k", 2, text)
        steps = out.partition("step by step")[2]
        assert str(tokenizer(text)["input_ids"]) in steps
        fills = fill_mask(model, tokenizer, text, top_k=2)
        for mask_fills in fills if isinstance(fills[0], list) else [fills]:
            assert all(f"{f['score']:<9.4g} {harmless(f['sequence'])}" in steps for f in mask_fills)

"""Masks filled together and sentences scored, against every combination tried one by one."""

import copy
import json
import math
import re

import pytest
import torch
from transformers import RobertaForMaskedLM

import infer
from mlm_scratch.hf.encode import spell_target
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.inference.joint import ORDERS, fill_jointly, score_sentence
from tests.support.tiny import byte_level_tokenizer, roberta, save_roberta, wordpiece_tokenizer

TOKENIZER = byte_level_tokenizer()
TEXT = "The <mask> Way is a <mask> galaxy."


@pytest.fixture(scope="module")
def model():
    """Weights so large that words depend on each other."""
    torch.manual_seed(3)
    return roberta(TOKENIZER, initializer_range=0.3).eval()


@torch.no_grad()
def log_p(model, ids, position):
    """(V,) log probabilities at one position; a mask is no answer."""
    scores = model(input_ids=ids[None]).logits[0, position].log_softmax(dim=-1)  # (V,)
    scores[TOKENIZER.mask_token_id] = -math.inf
    return scores


@pytest.mark.parametrize("order", ORDERS)
def test_it_finds_the_best_of_all_pairs_by_the_chain_rule(model, order):
    ids = TOKENIZER(TEXT, return_tensors="pt")["input_ids"][0]  # (T,)
    masks = (ids == TOKENIZER.mask_token_id).nonzero().flatten().tolist()
    certainty = [log_p(model, ids, position).max().item() for position in masks]
    assert certainty[1] > certainty[0]  # so the two orders differ
    first, second = masks if order == ORDERS[0] else reversed(masks)
    of_first = log_p(model, ids, first)  # (V,)
    pairs = torch.full((len(TOKENIZER), len(TOKENIZER)), -math.inf)  # (V, V)
    for a in range(len(TOKENIZER)):
        if a != TOKENIZER.mask_token_id:
            filled = ids.clone()
            filled[first] = a
            pairs[a] = of_first[a] + log_p(model, filled, second)
    best = pairs.flatten().topk(3)
    fills = fill_jointly(model, TOKENIZER, TEXT, order, top_k=3, beams=len(TOKENIZER))
    for fill, score, where in zip(fills, best.values, best.indices, strict=True):
        assert fill.score == pytest.approx(score.exp().item(), rel=1e-4)
        tokens = {first: where.item() // len(TOKENIZER), second: where.item() % len(TOKENIZER)}
        assert fill.tokens == [tokens[position] for position in masks]
    # One by one, as the pipeline does it, is not the same.
    alone = [log_p(model, ids, position).argmax().item() for position in masks]
    assert alone != fills[0].tokens


def test_a_fill_that_is_impossible_is_none(model):
    changed = copy.deepcopy(model)
    changed.lm_head.bias.data[10:] = -math.inf
    fills = fill_jointly(changed, TOKENIZER, TEXT, ORDERS[0], top_k=100)
    assert len(fills) == 81  # 10 tokens without the mask, twice
    assert all(fill.score > 0 and max(fill.tokens) < 10 for fill in fills)


def test_only_so_many_beams_are_kept(model, rows_of_each_pass):
    text = "The <mask> Way <mask> a <mask> galaxy."
    fills = fill_jointly(model, TOKENIZER, text, ORDERS[1], top_k=2, beams=4)
    assert len(fills) == 2 and rows_of_each_pass == [1, 4, 4]


def test_a_score_masks_each_token_by_itself(model):
    text = "Paris is the capital of France, and Rome is the capital of Italy."
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"][0]  # (T,)
    scores = score_sentence(model, TOKENIZER, text)
    assert [id for id, _ in scores] == ids[1:-1].tolist()
    for position, (id, score) in enumerate(scores, start=1):
        masked = ids.clone()
        masked[position] = TOKENIZER.mask_token_id
        assert score == pytest.approx(log_p(model, masked, position)[id].item(), rel=1e-4)


# ---- The command line ----------------------------------------------------------------------------


@pytest.fixture
def rows_of_each_pass(monkeypatch):
    """How many rows each forward pass was given."""
    forward, rows = RobertaForMaskedLM.forward, []

    def noted(self, input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(RobertaForMaskedLM, "forward", noted)
    return rows


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model for inputs of up to 64 tokens."""
    torch.manual_seed(1)
    return save_roberta(tmp_path_factory.mktemp("model"))


def test_many_lines_give_what_each_gives_alone(directory, call, rows_of_each_pass):
    lines = [f"{'very ' * (i % 4)}old <mask> {i}" for i in range(20)]
    code, out, err = call(infer, "--model", directory, "--top-k", 2, stdin="\n".join(lines))
    assert code == 0 and "texts" in err  # the bar
    assert rows_of_each_pass[-3:] == [8, 8, 4]
    for line, fills in zip(lines, out.strip().split("\n\n"), strict=True):
        _, alone, _ = call(infer, "--model", directory, "--top-k", 2, line)
        alone, _, _ = alone.partition("\n\nstep by step")
        for one, other in zip(fills.splitlines()[1:], alone.splitlines()[1:], strict=True):
            (score, *words), (score_alone, *words_alone) = one.split(), other.split()
            assert words == words_alone
            assert float(score) == pytest.approx(float(score_alone), rel=1e-3)


def test_a_target_after_a_space_is_taken_with_it_but_not_in_json(directory, call):
    arguments = ["--model", directory, "The Milky Way <mask> a galaxy.", "--targets", "is"]
    _, out, _ = call(infer, *arguments)
    assert "' is'" in out.splitlines()[1]
    _, out, _ = call(infer, *arguments, "--json")
    assert json.loads(out)[0]["token_str"] == "is"
    _, out, err = call(infer, *arguments[:3], arguments[2], "--targets", "of", "offside")
    assert err.count("target ' offside' is not one token, taking ' of'") == 1  # of both texts
    assert out.count("' of'") == 2 and "step by step" not in out  # it would show other words
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


@pytest.mark.parametrize(
    "tokenizer, target, before, spelled",
    [
        (TOKENIZER, "is", "", "is"),
        (TOKENIZER, "is", "A ", "Ġis"),
        (TOKENIZER, "is", "A (", "is"),
        (TOKENIZER, "is", "A <mask>", "is"),
        (TOKENIZER, " is", "", " is"),
        (TOKENIZER, "Ġis", "A ", "Ġis"),  # as the vocabulary has it
        (TOKENIZER, "offside", "A ", "Ġof"),  # no token: its first piece
        (TOKENIZER, "é", "A (", "Ã"),  # the vocabulary's é is a byte, the letter is of two
        (TOKENIZER, "", "A ", ""),
        (wordpiece_tokenizer(), "Paris", "A ", "paris"),
        (wordpiece_tokenizer(), "##s", "A ", "##s"),
    ],
)
def test_a_target_is_spelled_as_the_text_before_it_asks(tokenizer, target, before, spelled):
    assert spell_target(tokenizer, target, before) == spelled


def test_a_long_text_is_cut_when_asked_to(directory, call):
    text = "<mask> " + "galaxy " * 99
    code, _, err = call(infer, "--model", directory, text)
    assert code == 2
    assert "the model takes 64: shorten it, or let infer.py cut it with --truncate" in err
    for what in ([], ["--json"], ["--joint"], ["--score"]):
        scored = text.replace("<mask>", "A") if what == ["--score"] else text
        code, out, _ = call(infer, "--model", directory, "--truncate", *what, scored)
        assert code == 0 and out


def test_joint_and_score_say_what_they_found(directory, call):
    _, out, _ = call(infer, "--model", directory, "--joint", "--top-k", 2, TEXT)
    tokenizer, model = load_tokenizer(directory), load_model(directory).eval()
    for order in ORDERS:
        shown = out.split(f"  {order}\n")[1].splitlines()[:2]
        fills = fill_jointly(model, tokenizer, TEXT, order, top_k=2)
        for line, fill in zip(shown, fills, strict=True):
            assert float(line.split()[0]) == pytest.approx(fill.score, rel=1e-3)
            assert line.endswith(fill.sequence)
    _, out, _ = call(infer, "--model", directory, "--score", "The Milky Way is a spiral galaxy.")
    *tokens, total = out.splitlines()[1:-1]
    scores = [float(line.split()[0]) for line in tokens]
    assert float(total.split()[0]) == pytest.approx(sum(scores), abs=1e-2)
    perplexity = math.exp(-sum(scores) / len(scores))
    assert float(total.split()[-1]) == pytest.approx(perplexity, rel=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--joint", ""], "mark the gap"),
        (["--score", ""], "has no token to score"),
        (["--score", TEXT], "has a mask"),
        (["--joint", "--top-k", 0, TEXT], "top-k must be from 1 to 100"),
        (["--joint", TEXT, "--targets", "is"], "--targets goes with neither --joint nor --score"),
        (["--joint", "--score", TEXT], "not allowed with argument"),
        (["--truncate", "galaxy " * 99 + "<mask>"], "in the text 'galaxy galaxy"),
        ([TEXT, "no gap"], "text 2: no <mask> in the text 'no gap'"),
        (["--score", "words", "<mask>"], "text 2: the text '<mask>' has a mask"),
    ],
)
def test_what_cannot_be_filled_or_scored_is_one_line(directory, call, arguments, message):
    code, out, err = call(infer, "--model", directory, *arguments)
    assert code == 2 and message in err.splitlines()[-1] and out == ""

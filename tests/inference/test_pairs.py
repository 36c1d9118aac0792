"""Minimal pairs: the formats that are read, the verdicts, and their interval."""

import csv
import json

import pytest

import infer
from mlm_scratch.inference.pairs import Pair, judge, lines_of, read_pairs
from mlm_scratch.inference.score import METHODS, score_sentence
from mlm_scratch.util.errors import UserError
from tests.support.tiny import byte_level_tokenizer, roberta

PAIRS = [
    Pair("Paris is the capital.", "Paris are the capital.", "agreement"),
    Pair('A "quoted" word', "A tab", "quotes"),
]
# A line as in BLiMP's files.
BLIMP = {
    "sentence_good": "Who should Derek hug after shocking Richard?",
    "sentence_bad": "Who should Derek hug Richard after shocking?",
    "field": "syntax",
    "linguistics_term": "island_effects",
    "UID": "adjunct_island",
    "simple_LM_method": True,
    "pairID": "0",
}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_format_is_read(tmp_path):
    rows = ["\t".join(pair) for pair in PAIRS]
    assert read_pairs(write(tmp_path / "a.tsv", "\n".join(rows) + "\n\n")) == PAIRS
    named = ["phenomenon\tbad\tgood", *("\t".join((c, b, a)) for a, b, c in PAIRS)]
    assert read_pairs(write(tmp_path / "b.tsv", "\ufeff" + "\n".join(named))) == PAIRS
    lines = [json.dumps(pair._asdict()) for pair in PAIRS]
    assert read_pairs(write(tmp_path / "c.jsonl", "\n".join(lines))) == PAIRS
    (blimp,) = read_pairs(write(tmp_path / "d.jsonl", json.dumps(BLIMP)))
    assert blimp == (BLIMP["sentence_good"], BLIMP["sentence_bad"], "adjunct_island")
    (plain,) = read_pairs(write(tmp_path / "e.tsv", "good one\tbad one"))
    assert plain.phenomenon == "all pairs"
    assert read_pairs(write(tmp_path / "f.txt", "\n".join(rows))) == PAIRS
    assert read_pairs(write(tmp_path / "g.json", json.dumps([pair._asdict() for pair in PAIRS])))
    with (tmp_path / "h.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Bad", "GOOD", "UID"), *((b, a, c) for a, b, c in PAIRS)])
    assert read_pairs(str(tmp_path / "h.csv")) == PAIRS


@pytest.mark.parametrize(
    "header", ["good\tbad\t", "Good\tBAD\tphenomenon type", "\tsentence_good\tsentence_bad"]
)
def test_a_first_line_with_a_known_name_is_no_pair(tmp_path, header):
    """Whatever else is in it: an empty field, a name of several words, pandas' index."""
    cells = ["A b", "A c", "x"] if not header.startswith("\t") else ["0", "A b", "A c"]
    text = f"{header}\n" + "\t".join(cells if header.count("\t") == 2 else cells[:2])
    (pair,) = read_pairs(write(tmp_path / "a.tsv", text))
    assert pair[:2] == ("A b", "A c")


@pytest.mark.parametrize("phenomenon", [0, "0", 1, "agreement"])
def test_any_name_is_a_phenomenon(tmp_path, phenomenon):
    row = {"good": "a", "bad": "b", "phenomenon": phenomenon}
    (pair,) = read_pairs(write(tmp_path / "a.jsonl", json.dumps(row)))
    assert pair.phenomenon == str(phenomenon)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tsv", "only one\n", "line 1 of .*a.tsv has no good and bad sentence"),
        ("a.tsv", "sentence1\tsentence2\nA b\tA c", "first line .* looks like names of columns"),
        ("a.tsv", "acceptable\tunacceptable\nA b\tA c", "use good or sentence_good and bad or"),
        (
            "a.json",
            '{"good": {"0": "a b"}, "bad": {"0": "a c"}}',
            "line 1 of .* has no good and bad",
        ),
        ("a.pairs", "A b\tA c", "unknown kind of file; use .csv, .tsv, .txt, .jsonl, .json"),
        ("a.jsonl", '{"good": NaN, "bad": "b"}', "line 1 of .* has no good and"),
        ("a.tsv", "", "the file is empty"),
        ("a.tsv", "\n\n", "has no pairs"),
        ("a.jsonl", '{"good": "a", "bad": "b"}\n{"good": "a"}', "line 2 of .* has no good and"),
        ("a.jsonl", "[1]", "line 1 of .* is not a JSON object"),
        ("a.jsonl", "[" * 200_000, "line 1 of .* is not JSON"),
        ("a.tsv", "good\tbad\n\t b", "line 2 of .*a.tsv has no good and bad sentence"),
        ("a.jsonl", "{", "line 1 of .* is not JSON"),
        ("none.tsv", None, "no such file"),
    ],
)
def test_what_is_no_pair_is_reported(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"--pairs: .*{message}"):
        read_pairs(str(tmp_path / name))


@pytest.mark.parametrize("method", METHODS)
def test_the_verdict_is_that_of_the_scores(method):
    tokenizer = byte_level_tokenizer()
    model = roberta(tokenizer, initializer_range=0.3).eval()
    total = {
        text: sum(p for _, p in score_sentence(model, tokenizer, text, method=method))
        for pair in PAIRS
        for text in pair[:2]
    }
    both_ways = [*PAIRS, *(Pair(bad, good, "swapped") for good, bad, _ in PAIRS)]
    gains = judge(model, tokenizer, both_ways, method)
    assert gains["agreement"] == [total[PAIRS[0].good] - total[PAIRS[0].bad]]
    assert gains["swapped"] == [-gains["agreement"][0], -gains["quotes"][0]]
    assert judge(model, tokenizer, [Pair("the same", "the same")], method) == {"all pairs": [0.0]}


def test_all_pairs_are_checked_before_one_is_scored(monkeypatch):
    tokenizer = byte_level_tokenizer()
    model = roberta(tokenizer).eval()
    monkeypatch.setattr("mlm_scratch.inference.pairs.score_sentence", None)  # not called
    for text, message in (("long " * 80, "the model takes 64"), ("a <mask>", "has a mask")):
        with pytest.raises(UserError, match=message):
            judge(model, tokenizer, [*PAIRS, Pair(text, "b")], METHODS[0])
    monkeypatch.undo()
    assert judge(model, tokenizer, [Pair("long " * 80, "b")], METHODS[0], truncate=True)


def test_the_table_has_a_line_per_phenomenon():
    """A tie is in a column of its own, and not right."""
    *rows, last = lines_of({"a": [0.5] * 9 + [-2.0], "longer": [0.0]})
    assert rows[1].split()[:5] == ["a", "9", "0", "10", "0.900"]
    assert rows[2].split()[:5] == ["longer", "0", "1", "1", "0.000"]
    assert last.split()[:5] == ["all", "9", "1", "11", "0.818"]
    rounding = [*lines_of({"a": [1e-7, -1e-7, 1e-3]})][1].split()
    assert rounding[:4] == ["a", "1", "2", "3"]
    alike = lines_of({"a" * 70 + "b": [1.0], "a" * 70 + "c": [-1.0], "all": [1.0]})
    assert [line.split()[1:4:2] for line in alike][1:] == [[*"11"], [*"01"], [*"11"], [*"23"]]


def test_the_command_prints_the_table(files, call, tmp_path):
    path = write(tmp_path / "a.tsv", "\n".join("\t".join(pair) for pair in PAIRS))
    code, out, _ = call(infer, "--model", files / "model", "--pairs", path)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [
        "phenomenon",
        "agreement",
        "quotes",
        "all",
    ]
    code, _, err = call(infer, "--model", files / "model", "--pairs", path, "A text")
    assert code == 2 and "--pairs has its sentences in a file" in err

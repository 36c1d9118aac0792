"""Sources of text, and the way from documents to rows of ids."""

import csv
import gzip
import json
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import processors

from mlm_scratch.config import resolve
from mlm_scratch.data import rows as data
from mlm_scratch.data.rows import load_documents, prepare_rows
from mlm_scratch.util.errors import UserError
from tests.support.tiny import SENTENCES, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()


def config(*files, **settings):
    settings = {"eval_fraction": 0.0} | settings
    return resolve("tutorial", {"train_file": tuple(map(str, files)), **settings})


def write_text(path, texts=SENTENCES):
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def write_gz(path):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in SENTENCES))


def write_jsonl(path):
    path.write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES), encoding="utf-8")


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["number", "text"], *enumerate(SENTENCES)])


def write_txt_with_mark(path):
    path.write_text("\n".join(SENTENCES), encoding="utf-8-sig")


def write_parquet_gz(path):
    write_parquet(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


def write_parquet(path):
    pyarrow.parquet.write_table(pa.table({"text": SENTENCES}), path)


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.txt", write_text),
        ("a.jsonl", write_jsonl),
        ("a.jsonl.gz", write_gz),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
        ("a.parquet.gz", write_parquet_gz),
        ("mark.TXT", write_txt_with_mark),
    ],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name, write):
    write(tmp_path / name)
    documents, evaluation = load_documents(config(tmp_path / name))
    assert list(documents) == SENTENCES
    assert evaluation is None


def test_several_files_and_a_slice(tmp_path):
    write_text(tmp_path / "a.txt")
    write_text(tmp_path / "b.txt", ["one more"])
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    assert list(load_documents(config(*files))[0]) == [*SENTENCES, "one more"]
    assert list(load_documents(config(*files, split="train[5:]"))[0]) == [SENTENCES[5], "one more"]


ANSWERS = [["first", "second"], [], ["third"]]


@pytest.mark.parametrize(
    "rows, column",
    [
        ([{"answers": {"text": texts}} for texts in ANSWERS], "answers.text"),
        ([{"answers": [{"text": text} for text in texts]} for texts in ANSWERS], "answers.text"),
        ([{"answers.text": texts} for texts in ANSWERS], "answers.text"),
        ([{"answers": texts} for texts in ANSWERS], "answers"),
    ],
    ids=["struct of lists", "list of structs", "flattened", "list"],
)
def test_both_schemas_of_answers(tmp_path, rows, column):
    for name in ("a.json", "a.jsonl"):  # by `datasets`, and line by line
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)))
        documents, _ = load_documents(config(path, text_column=column))
        assert list(documents) == ["first second", "", "third"]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_may_have_other_types_in_other_files(tmp_path, streaming):
    """As in ELI5, where the first questions have no links."""
    files = (
        [{"text": "a", "links": {"url": []}}, {"text": None, "links": 3}],
        [{"text": "b", "links": {"url": ["x"]}}, {"links": None}, {"text": "c", "more": [1, "2"]}],
    )
    for number, rows in enumerate(files):
        (tmp_path / f"{number}.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    paths = tuple(str(tmp_path / f"{number}.jsonl") for number in range(2))
    settings = replace(config(paths[0], streaming=streaming, max_steps=9), train_file=paths)
    documents, _ = load_documents(settings)
    assert list(documents) == ["a", "", "b", "", "c"]


def test_blocks_are_the_concatenated_documents_cut_every_block_size(tmp_path):
    write_text(tmp_path / "a.txt")
    settings = config(tmp_path / "a.txt", block_size=8)
    rows = prepare_rows(load_documents(settings)[0], TOKENIZER, settings)
    stream = list(chain.from_iterable(TOKENIZER(SENTENCES)["input_ids"]))
    blocks = [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
    assert [rows.tokens[a:b].tolist() for a, b in pairwise(rows.starts)] == blocks


def test_lines_are_one_document_each_cut_at_block_size(tmp_path):
    write_text(tmp_path / "a.txt", ["Water boils.", "", "  ", SENTENCES[5]])
    settings = config(tmp_path / "a.txt", block_size=16, grouping="lines")
    rows = prepare_rows(load_documents(settings)[0], TOKENIZER, settings)
    expected = TOKENIZER(["Water boils.", SENTENCES[5]], truncation=True, max_length=16)
    got = [rows.tokens[a:b].tolist() for a, b in pairwise(rows.starts)]
    assert got == expected["input_ids"]
    assert len(got[1]) == 16 and got[1][-1] == TOKENIZER.eos_token_id


def test_rows_lie_in_mapped_files_and_are_found_again(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", [*SENTENCES, "found again"])
    settings = config(tmp_path / "a.txt", block_size=8, whole_word=True)
    documents, _ = load_documents(settings)
    rows = prepare_rows(documents, TOKENIZER, settings)
    assert isinstance(rows.tokens.base, np.memmap) and rows.tokens.dtype == np.uint16
    assert len(rows.gap_before) == len(rows.tokens)

    def never(*args):
        raise AssertionError("tokenized twice")

    monkeypatch.setattr(data, "tokenize", never)
    again = prepare_rows(documents, TOKENIZER, settings)
    assert np.array_equal(again.tokens, rows.tokens)
    # Another block size cuts the same stream; other words need another file.
    assert len(prepare_rows(documents, TOKENIZER, replace(settings, block_size=16))) < len(rows)
    with pytest.raises(AssertionError, match="tokenized twice"):
        prepare_rows(documents, TOKENIZER, replace(settings, whole_word=False))


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_words_begin_at_gaps_whether_or_not_offsets_count_them_in(tmp_path, trim_offsets):
    tokenizer = byte_level_tokenizer()
    if not trim_offsets:  # as in the tokenizers of many models
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    write_text(tmp_path / "a.txt", ["Unbelievable misunderstandings,\u3000Milky Café!"])
    settings = config(tmp_path / "a.txt", whole_word=True, grouping="lines")
    rows = prepare_rows(load_documents(settings)[0], tokenizer, settings)
    words, tokens = [], tokenizer.convert_ids_to_tokens(rows.tokens.tolist())
    for token, starts in zip(tokens[1:-1], rows.gap_before[1:-1], strict=True):
        words += [""] if starts or not words else []  # <s> counts as a gap later on
        words[-1] += token.replace("Ġ", "")
    assert words == ["Unbelievable", "misunderstandings,", "ãĢĢMilky", "CafÃ©!"]
    assert len(tokens) > 10  # the words really are of several pieces, é and the wide space too


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_file_in_the_cache_is_written_again(tmp_path, damage):
    write_text(tmp_path / "a.txt", [*SENTENCES, "cut short"])
    settings = config(tmp_path / "a.txt", block_size=8)
    documents, _ = load_documents(settings)
    expected = prepare_rows(documents, TOKENIZER, settings).tokens.tolist()
    for path in data.cache_dir().glob("*/tokens.bin"):
        content = path.read_bytes()
        flipped = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes(content[:-3] if damage == "cut" else flipped)
    assert prepare_rows(documents, TOKENIZER, settings).tokens.tolist() == expected


def test_a_file_name_is_not_a_pattern(tmp_path):
    write_text(tmp_path / "x[1].txt", ["this one"])
    write_text(tmp_path / "x1.txt", ["not this one"])
    assert list(load_documents(config(tmp_path / "x[1].txt"))[0]) == ["this one"]


def test_a_data_set_that_is_a_script_is_not_run(tmp_path):
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UserError, match=r"cannot load data set .*script"):
        load_documents(resolve("tutorial", {"dataset": str(script)}))


def test_what_was_written_half_is_not_used(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", [*SENTENCES, "half written"])
    settings = config(tmp_path / "a.txt", block_size=8)
    documents, _ = load_documents(settings)
    tokenize = data.tokenize

    def broken(*args):
        yield from list(tokenize(*args))[:3]
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "tokenize", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare_rows(documents, TOKENIZER, settings)
    monkeypatch.setattr(data, "tokenize", tokenize)
    rows = prepare_rows(documents, TOKENIZER, settings)
    stream = list(chain.from_iterable(TOKENIZER(list(documents))["input_ids"]))
    assert rows.tokens.tolist() == stream


def test_the_held_out_part_is_the_same_for_a_seed_and_apart_from_the_rest(tmp_path):
    texts = [f"text {i}" for i in range(50)]
    write_text(tmp_path / "a.txt", texts)
    train, held_out = load_documents(config(tmp_path / "a.txt", eval_fraction=0.2))
    assert len(held_out) == 10 and sorted([*train, *held_out]) == sorted(texts)
    again = load_documents(config(tmp_path / "a.txt", eval_fraction=0.2))[1]
    other = load_documents(config(tmp_path / "a.txt", eval_fraction=0.2, seed=1))[1]
    assert list(again) == list(held_out) != list(other)


def test_evaluation_files_of_their_own(tmp_path):
    write_text(tmp_path / "a.txt")
    write_text(tmp_path / "b.txt", ["held out"])
    settings = resolve(
        "tutorial",
        {"train_file": (str(tmp_path / "a.txt"),), "eval_file": (str(tmp_path / "b.txt"),)},
    )
    train, held_out = load_documents(settings)
    assert list(train) == SENTENCES and list(held_out) == ["held out"]


def test_the_bundled_corpus_takes_the_same_way():
    settings = resolve("bundled", {})
    train, held_out = load_documents(settings)
    assert train.column == "answers.text" and len(train) > len(held_out) > 0
    assert any("Milky Way" in text for text in train)


def test_too_little_text_is_said(tmp_path):
    write_text(tmp_path / "a.txt", ["short"])
    settings = config(tmp_path / "a.txt")
    with pytest.raises(UserError, match="too few for one row of 128"):
        prepare_rows(load_documents(settings)[0], TOKENIZER, settings)
    with pytest.raises(UserError, match="none can be held out"):
        load_documents(config(tmp_path / "a.txt", eval_fraction=0.5))


def test_text_without_text_is_said(tmp_path):
    write_text(tmp_path / "a.txt", ["", "  "] * 500)
    settings = config(tmp_path / "a.txt")
    with pytest.raises(UserError, match="every document is empty"):
        prepare_rows(load_documents(settings)[0], TOKENIZER, settings)


def test_the_word_na_in_a_table_is_a_word(tmp_path):
    (tmp_path / "a.csv").write_text("text\nNA\nnull\n")
    assert list(load_documents(config(tmp_path / "a.csv"))[0]) == ["NA", "null"]


def test_a_missing_inner_column_is_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"answers": {"text": ["a"]}}))
    with pytest.raises(UserError, match=r"no column 'answers.body'; it has answers"):
        load_documents(config(path, text_column="answers.body"))

"""Local files are read as they are now, and one column of them only."""

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from mlm_scratch.config import changed, resolve
from mlm_scratch.data.documents import load_documents
from mlm_scratch.util.errors import UserError
from tests.support.tiny import text_config


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_a_file_that_was_replaced_with_the_same_time_is_read_again(tmp_path, name):
    path = tmp_path / name
    for text in ("one", "two"):
        content = {"a.txt": text, "a.csv": f"text\n{text}"}.get(name, json.dumps({"text": text}))
        path.write_text(content)
        os.utime(path, ns=(10**18, 10**18))
        assert list(load_documents(text_config(path))[0]) == [text]


def test_a_directory_whose_files_were_replaced_with_the_same_time_is_read_again(tmp_path):
    path = tmp_path / "data/a.txt"
    path.parent.mkdir()
    for text in ("one", "two"):
        path.write_text(text)
        os.utime(path, ns=(10**18, 10**18))
        settings = resolve("tutorial", {"dataset": str(tmp_path / "data"), "eval_fraction": 0.0})
        assert list(load_documents(settings)[0]) == [text]


def test_a_local_directory_never_stands_in_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other/data").mkdir(parents=True)
    Path("other/data/a.txt").write_text("of another project")
    monkeypatch.chdir("other")
    datasets.load_dataset("data", split="train", cache_dir=datasets.config.HF_DATASETS_CACHE)
    monkeypatch.chdir("..")
    with pytest.raises(UserError, match=r"data set data is not cached.*from a local directory"):
        load_documents(resolve("tutorial", {"dataset": "data"}))


@pytest.mark.parametrize("streaming", [False, True])
def test_text_in_a_table_that_looks_like_a_number_stays_as_it_is(tmp_path, streaming):
    path = tmp_path / "a.csv"
    rows = ["001", "1e5", "NA", "", "True", *["7"] * 10_000, "text after all"]
    path.write_text("n,text\n" + "\n".join(f"1,{row}" for row in rows))
    settings = text_config(path, streaming=streaming, max_steps=1)
    assert list(load_documents(settings)[0]) == rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_other_columns_may_be_anything(tmp_path, kind, streaming):
    """Other names, other types, another order, and a blank where numbers were."""
    tables = (
        {"n": [1, 2], "text": ["a", "b"]},
        {"text": ["c", "d"], "n": ["", "x"], "more": [None, "1"]},
    )
    paths = []
    for number, table in enumerate(tables):
        paths.append(tmp_path / f"{number}.{kind}")
        rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        if kind == "parquet":
            pyarrow.parquet.write_table(pa.table(table), paths[-1])
        elif kind == "csv":
            with paths[-1].open("w", newline="") as file:
                csv.writer(file).writerows([table, *(row.values() for row in rows)])
        else:
            lines = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
            paths[-1].write_text(lines)
    settings = text_config(*paths, streaming=streaming, max_steps=1)
    assert list(load_documents(settings)[0]) == ["a", "b", "c", "d"]


def test_a_column_that_one_file_lacks_is_reported(tmp_path):
    for name, header in (("a.csv", "text,n"), ("b.csv", "body,n")):
        (tmp_path / name).write_text(f"{header}\nx,1\n")
    with pytest.raises(UserError, match=r"b\.csv has no column 'text'; it has body, n"):
        load_documents(text_config(tmp_path / "a.csv", tmp_path / "b.csv"))


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_of_json_may_lack_the_column_wherever_they_are(tmp_path, streaming):
    """More of them at the start than are read at once; NaN is a missing value, too."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"other": 1}\n' * 1500 + '{"text": NaN}\n{"text": "found"}\n')
    settings = text_config(path, text_column="text", streaming=streaming, max_steps=1)
    assert list(load_documents(settings)[0]) == [""] * 1501 + ["found"]
    with pytest.raises(UserError, match="has no column 'body'; it has other, text"):
        load_documents(changed(settings, text_column="body"))


def test_what_is_no_text_is_reported_with_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 3 + '{"text": 7}\n')
    with pytest.raises(UserError, match=r"row 4 of .*'text' holds int, not text$"):
        list(load_documents(text_config(path))[0])
    path.write_text('{"text": 7}\n')
    with pytest.raises(
        UserError, match=r"row 1 .* holds int, not text: pass another --text-column"
    ):
        list(load_documents(text_config(path, text_column="text"))[0])


def test_unpacked_parquet_leaves_one_copy(tmp_path):
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    packed = gzip.compress((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "a.parquet.gz").write_bytes(packed)
    sizes, cache = [], Path(datasets.config.HF_DATASETS_CACHE)
    for _ in range(2):
        load_documents(text_config(tmp_path / "a.parquet.gz"))
        sizes.append(sum(1 for path in cache.rglob("*") if path.is_file()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["a::b.txt", "https:x.txt", "x y#?%[1]*.txt", "é.txt", "-.txt"])
@pytest.mark.parametrize("streaming", [False, True])
def test_any_name_of_a_file_works(tmp_path, name, streaming):
    (tmp_path / name).write_text("this one")
    settings = text_config(tmp_path / name, streaming=streaming, max_steps=1)
    assert list(load_documents(settings)[0]) == ["this one"]


def test_a_data_set_that_was_saved_to_disk_is_one(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(9)]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        settings = {"dataset": str(tmp_path / name), "eval_fraction": 0.0, "split": "train[2:4]"}
        documents, _ = load_documents(resolve("tutorial", settings))
        assert list(documents) == ["text 2", "text 3"]


def test_a_text_file_has_no_columns_to_name(tmp_path):
    """The column is that of the other file."""
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    (tmp_path / "prose.txt").write_text("held out")
    given = {"train_file": (str(tmp_path / "a.jsonl"),), "text_column": "body"}
    settings = resolve("tutorial", given | {"eval_file": (str(tmp_path / "prose.txt"),)})
    train, held_out = load_documents(settings)
    assert list(train) == ["a", "b"] and list(held_out) == ["held out"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_only_column_that_is_text_is_found(tmp_path, capsys, kind):
    path = tmp_path / f"a.{kind}"
    table = {"n": [1, 2], "body": ["a", "b"]}
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.table(table), path)
    elif kind == "csv":
        path.write_text("n,body\n1,a\n2,b\n")
    else:
        path.write_text('{"n": 1, "body": "a"}\n{"n": 2, "body": "b"}\n')
    assert list(load_documents(text_config(path))[0]) == ["a", "b"]
    assert "text column: body, the only one of" in capsys.readouterr().out


def test_a_comma_at_the_end_of_rows_shifts_no_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nhello,1,\nworld,2,\n")
    assert list(load_documents(text_config(path))[0]) == ["hello", "world"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("label,text\n1,hello, you\n", "row 1 has 3 fields, the header 2"),
        ("text,n\n" + "a,1\n" * 2000 + "b,2,3\n", "row 2001 has 3 fields, the header 2"),
        ("text;label\nhello, you;1\n", "no commas in the header 'text;label'"),
    ],
    ids=["a comma in a text", "far down", "semicolons"],
)
def test_a_table_that_would_be_cut_is_refused(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"a.csv: {message}"):
        load_documents(text_config(path))


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.GZ", "a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    """Nor is that of the second file; suffixes may be in capitals."""
    paths = [tmp_path / name, tmp_path / f"b-{name}"]
    for path in paths:
        content = {"t": "one", "c": "text\none"}.get(name.lower()[2], json.dumps({"text": "one"}))
        raw = content.encode("utf-8-sig")
        path.write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    assert list(load_documents(text_config(*paths))[0]) == ["one", "one"]


def test_a_stream_reads_its_own_file_and_not_an_equal_one(tmp_path):
    """Of two files with the same content, the other is changed before the first is read."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    first, _ = load_documents(text_config(tmp_path / "a.txt", streaming=True, max_steps=1))
    load_documents(text_config(tmp_path / "b.txt", streaming=True, max_steps=1))
    (tmp_path / "b.txt").write_text("changed")
    assert list(first) == ["the same"]


def test_parquet_files_without_rows_are_left_out(tmp_path):
    for name, texts in (("a", []), ("b", ["one"]), ("c", [])):
        table = pa.table({"text": pa.array(texts, pa.string())})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    paths = [tmp_path / f"{name}.parquet" for name in "abc"]
    assert list(load_documents(text_config(*paths))[0]) == ["one"]
    with pytest.raises(UserError, match="there is no text in it"):
        load_documents(text_config(paths[0]))

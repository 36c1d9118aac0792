"""Small tables: every format gives the same rows, and what is wrong is named by its line."""

import csv
import gzip
import json

import pytest

from mlm_scratch.data.tables import Row, read_table
from mlm_scratch.util.errors import UserError

ROWS = [
    {"text": '"A lone quote begins this one', "label": "0"},
    {"text": "Milky Way, a galaxy", "label": "sky"},
    {"text": "x" * 200_000, "label": "long"},
]


def as_tabs(path):
    lines = ["text\tlabel", *("\t".join(row.values()) for row in ROWS)]
    path.write_text("\n".join(lines) + "\n")


def as_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def as_lines(path):
    path.write_text("\n".join(map(json.dumps, ROWS)))


def as_columns(path):
    path.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))


def packed(write):
    def written(path):
        write(path.with_suffix(""))
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))

    return written


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.tsv", as_tabs),
        ("a.txt", as_tabs),
        ("a.csv", as_csv),
        ("a.jsonl", as_lines),
        ("lines.json", as_lines),
        ("list.json", lambda path: path.write_text(json.dumps(ROWS))),
        ("columns.json", as_columns),
        ("a.tsv.gz", packed(as_tabs)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert [row.values for row in read_table(str(tmp_path / name))] == ROWS


def test_a_value_is_text_as_the_file_has_it_or_missing(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"a": 1, "b": true, "c": 1.50}\n\n{"a": NaN, "b": null, "c": " "}\n{"a": []}\n'
    )
    assert [*read_table(str(tmp_path / "a.jsonl"))] == [
        Row(1, {"a": "1", "b": "true", "c": "1.5"}),
        Row(3, {}),
        Row(4, {}),
    ]
    (tmp_path / "pandas.csv").write_text(',a, "b"\n0,1,2\n')
    assert [*read_table(str(tmp_path / "pandas.csv"))] == [Row(2, {"a": "1", "b": "2"})]
    (tmp_path / "a.csv").write_text('a,b\n1,\n"two\nlines",2\n,3\n')
    assert [*read_table(str(tmp_path / "a.csv"))] == [
        Row(2, {"a": "1"}),
        Row(3, {"a": "two\nlines", "b": "2"}),
        Row(5, {"b": "3"}),
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', "line 3 of .*a.csv is not CSV"),
        ("a.csv", "a,b\n1,2,3\n", "line 2 of .*a.csv has 3 fields, but there are 2 columns: a, b"),
        ("a.csv", "a,b,a\n1,2,3\n", "line 1 of .*a.csv has the column 'a' twice"),
        ("a.tsv", "a\tb\n1\t2\t3\n", "line 2 of .*a.tsv has 3 fields"),
        ("a.jsonl", '{"a": 1}\n{"a"\n', "line 2 of .*a.jsonl is not JSON"),
        ("a.json", "[" * 200_000, "cannot read"),
        ("a.json", '[{"a": 1}, 2]', "line 2 of .*a.json is not a JSON object"),
        ("a.csv.gz", "not packed", "cannot read .*a.csv.gz"),
        ("a.parquet", "x", "unknown kind of file; use .csv, .tsv, .txt, .jsonl, .json .or .gz"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_table(str(tmp_path / name)))

"""Small tables in files -> rows of named values: labelled texts, pairs, lists of words.

.csv           commas between fields; a field with a comma or a quote in it is quoted
.tsv  .txt     tabs between fields, and quotes are text like any other
.jsonl  .json  an object per row

Each may be compressed (.gz). Texts to train on are read by files.py instead, as a data set.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from mlm_scratch.util.errors import UserError

KINDS = {".csv": "csv", ".tsv": "tabs", ".txt": "tabs", ".jsonl": "json lines", ".json": "json"}


class Row(NamedTuple):
    """A row of a table."""

    number: int  # of its line, or in .json of its object, from 1
    values: dict[str, str]  # by column; one without a value is missing


def read_table(
    path: str, columns: Sequence[str] = (), header: bool | Collection[str] = True
) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        path: the file.
        columns: the names of the columns where no header names them.
        header: whether the first line of .csv, .tsv and .txt is one; or the names, in lower case,
            of which one has to be in it to make it one.

    Raises:
        UserError: the file cannot be read; the message names the line.
    """
    kind = kind_of(path, KINDS)
    try:
        with io.TextIOWrapper(open_unpacked(Path(path)), encoding="utf-8-sig", newline="") as file:
            if kind.startswith("json"):
                objects = _json_lines(path, file) if kind == "json lines" else _json(path, file)
                yield from _named(path, objects)
            else:
                lines = _csv(path, file) if kind == "csv" else _tabs(file)
                yield from _under_header(path, lines, columns, header)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _csv(path: str, file: io.TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)
    reader, begun = csv.reader(file, strict=True, skipinitialspace=True), 1
    try:
        for cells in reader:
            yield begun, cells
            begun = reader.line_num + 1
    except csv.Error as error:  # a quote that is never closed shows at the end of the file only
        raise UserError(f"line {begun} of {path} is not CSV: {error}") from error


def _tabs(file: io.TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(file, start=1):
        yield number, line.rstrip("\r\n").split("\t")


def _under_header(
    path: str,
    lines: Iterator[tuple[int, list[str]]],
    columns: Sequence[str],
    header: bool | Collection[str],
) -> Iterator[Row]:
    """Name the fields of each line. Raises UserError for more fields than columns."""
    lines = (line for line in lines if any(map(str.strip, line[1])))
    if (first := next(lines, None)) is None:
        return
    names = [cell.strip() for cell in first[1]]
    if header if isinstance(header, bool) else {*map(str.lower, names)} & {*header}:
        columns = names
        twice = [name for name in names if name and names.count(name) > 1]
        if twice:
            raise UserError(f"line {first[0]} of {path} has the column {twice[0]!r} twice")
    else:
        lines = chain([first], lines)
    for number, cells in lines:
        if any(cell.strip() for cell in cells[len(columns) :]):
            raise UserError(
                f"line {number} of {path} has {len(cells)} fields, but there are {len(columns)} "
                f"columns: {', '.join(columns)}"
            )
        named = zip(columns, cells, strict=False)
        yield Row(number, {name: cell for name, cell in named if name and cell.strip()})


def _json_lines(path: str, file: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} of {path} is not JSON: {error}") from error


def _json(path: str, file: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    text = file.read()
    try:
        rows = rows_of_json(text)
    except RecursionError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    lines = _json_lines(path, io.StringIO(text))  # type: ignore[arg-type]
    return lines if rows is None else enumerate(rows, start=1)


def _named(path: str, objects: Iterator[tuple[int, Any]]) -> Iterator[Row]:
    for number, row in objects:
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {path} is not a JSON object")
        texts = {name: _as_text(value) for name, value in row.items()}
        yield Row(number, {name: text for name, text in texts.items() if text.strip()})


def _as_text(value: Any) -> str:
    """Return a value of JSON as it is written there; "" for null, NaN, lists and objects."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, list | dict) or value != value:
        return ""
    return json.dumps(value)


def read_words(path: str) -> list[str]:
    """Read a file with a word per line, or a table with the column "word", without duplicates.

    Raises:
        UserError: the file cannot be read, or a line is not a word.
    """
    words = []
    try:
        for number, values in read_table(path, ["word"], header=["word"]):
            if values.keys() != {"word"}:
                raise UserError(f"line {number} of {path} has no word, but {', '.join(values)}")
            words.append(values["word"].strip())
            if not words[-1].isprintable():
                raise UserError(f"line {number} of {path} has a word that cannot be printed")
    except UserError as error:
        raise UserError(f"--add-tokens: {error}") from error
    words = list(dict.fromkeys(words))
    if not words:
        raise UserError(f"--add-tokens: {path} has no words")
    return words


# ---- Files of any kind (files.py uses these, too) ------------------------------------------------


def kind_of(file: str, kinds: Mapping[str, str]) -> str:
    """Return the kind of a file by its suffix. Raises UserError if unknown, missing or empty."""
    path = Path(file)
    suffix = (Path(path.stem).suffix if is_packed(path) else path.suffix).lower()
    if suffix not in kinds:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(kinds)} (or .gz)")
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
    except OSError as error:  # a name that is too long
        raise UserError(f"{path}: {error.strerror}") from error
    return kinds[suffix]


def is_packed(path: Path) -> bool:
    """Whether a file is compressed."""
    return path.suffix.lower() == ".gz"


def open_unpacked(path: Path) -> IO[bytes]:
    """Open a file, compressed or not."""
    return gzip.open(path) if is_packed(path) else path.open("rb")  # type: ignore[return-value]


def rows_of_json(text: str) -> list[Any] | None:
    """Return the rows of a .json file: a list, or equally long columns. None: it holds lines."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if isinstance(content, dict):
        columns = content.values()
        is_table = columns and all(isinstance(value, list) for value in columns)
        if is_table and len({len(value) for value in columns}) == 1:
            content = [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
    return content if isinstance(content, list) else [content]

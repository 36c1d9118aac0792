"""Local files -> a data set of the text column alone, read as strings.

`datasets` reads the files, but it keys its cache by path and modification time, expands a path as a
glob pattern, and infers the types of all columns from the first rows. So it gets links with plain
names, a separate cache directory keyed by the files' contents, and a single column to read.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import datasets
import pyarrow.parquet

from mlm_scratch.data.tables import is_packed, kind_of, open_unpacked, rows_of_json
from mlm_scratch.util.errors import UserError, is_own_fault, shortened
from mlm_scratch.util.files import checksum

FILE_KINDS = {
    ".txt": "text",
    ".jsonl": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
SAMPLE = 1000  # rows that show which columns are text
NO_ROWS = 'SchemaInferenceError|"train" corresponds to no data'  # how `datasets` says it
Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def load_files(
    paths: tuple[str, ...], column: str | None, split: str, streaming: bool
) -> tuple[Rows, str | None, str]:
    """Load the text column of local files as they are now.

    Args:
        paths: files of one kind; each may be compressed (.gz).
        column: the text column, dotted if nested; None: find it.
        split: "train" or a slice of it.
        streaming: read on demand.

    Returns:
        (rows, column, version): the data set, whose column "text" has a line of JSON per row where
        the files are JSON (column is then as given); the column; a digest of the contents, "" for
        a stream.

    Raises:
        UserError: a file that is missing, of an unknown kind, or without the column.
    """
    kinds = {kind_of(path, FILE_KINDS) for path in paths}
    if len(kinds) > 1:
        raise UserError(f"files of one kind at a time, not {', '.join(sorted(kinds))} together")
    kind = kinds.pop()
    with errors_of(paths[0]):
        # A stream is not cached, and may be too long to be read beforehand.
        version = "" if streaming else contents_key(kind, map(Path, paths))
        directory = cache_of(version)
        paths, files = _stage_all(paths, kind, directory)
        reader, options = "text", {"encoding": "utf-8-sig"}  # strips a byte-order mark
        if kind in ("csv", "parquet"):
            column, top_level = _find_column(paths, files, kind, column, streaming)
            reader, options = kind, _options(kind, top_level)
        elif kind == "text":
            column = "text"
        rows = datasets.load_dataset(
            reader,
            data_files=[str(file) for file in files],
            split=split,
            streaming=streaming,
            cache_dir=str(directory / "datasets"),
            **options,
        )
    return rows, column, version


def contents_key(kind: str, paths: Any) -> str:
    """Digest the contents of files, in order."""
    return hashlib.sha256(json.dumps([kind, *map(checksum, paths)]).encode()).hexdigest()


def cache_of(version: str) -> Path:
    """Return the cache directory for files of these contents; all streams share one for links."""
    return Path(datasets.config.HF_DATASETS_CACHE) / f"mlm_scratch-{version[:32] or 'streams'}"


@contextmanager
def errors_of(source: str) -> Iterator[None]:
    """Turn what `datasets` raises while it reads `source` into a UserError."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the message below is enough
    try:
        yield
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        zlib.error,
        csv.Error,
        OSError,
        ValueError,
        EOFError,
        RuntimeError,  # a data set defined by a script
        TypeError,  # a column whose type differs between files
    ) as error:
        if is_own_fault(error):
            raise
        if re.search(NO_ROWS, f"{error!r} {error.__cause__!r}"):
            raise no_text(source) from error
        while error.__cause__ is not None:  # datasets wraps the parser's own error
            error = error.__cause__
        raise UserError(f"cannot load {source}: {type(error).__name__}: {error}") from error


def _stage_all(
    paths: tuple[str, ...], kind: str, directory: Path
) -> tuple[tuple[str, ...], list[Path]]:
    """Stage all files below `directory`; return the paths of files with rows and the staged files.

    Files of equal content share a cache, but not the links: one of the files may change later.
    """
    names = json.dumps([str(Path(path).resolve()) for path in paths])
    links = directory / hashlib.sha256(names.encode()).hexdigest()[:16]
    links.mkdir(parents=True, exist_ok=True)
    files = [_staged(Path(path), kind, number, links) for number, path in enumerate(paths)]
    if kind != "parquet":
        return paths, files
    sizes = [pyarrow.parquet.read_metadata(file).num_rows for file in files]
    if not any(sizes):  # `datasets` cannot read a parquet file without rows
        raise no_text(paths[0])
    return (
        tuple(path for path, size in zip(paths, sizes, strict=True) if size),
        [file for file, size in zip(files, sizes, strict=True) if size],
    )


def _staged(path: Path, kind: str, number: int, directory: Path) -> Path:
    """Stage a file under a plain name, in a form that `datasets` reads; return the staged file.

    It is a link, except that .parquet.gz is decompressed and .json is rewritten as JSON Lines.
    """
    packed = is_packed(path)
    converted = kind == "json" or (kind == "parquet" and packed)
    suffix = {"text": ".txt", "csv": ".csv", "parquet": ".parquet"}.get(kind, ".jsonl")
    staged = directory / f"{number}{suffix}{'.gz' if packed and not converted else ''}"
    new = directory / f".{os.getpid()}-{staged.name}"
    try:
        if converted:
            write = _write_json_lines if kind == "json" else shutil.copyfileobj
            with open_unpacked(path) as source, new.open("wb") as target:
                write(source, target)
            os.utime(new, (0, 0))  # constant: `datasets` keys its cache by it
        else:
            _link(path.resolve(), new)
        os.replace(new, staged)
    finally:
        new.unlink(missing_ok=True)
    return staged


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path)
    except OSError:  # the system does not allow links
        shutil.copyfile(path, link)


def _write_json_lines(source: IO[bytes], target: IO[bytes]) -> None:
    """Rewrite a .json file as JSON Lines."""
    text = source.read().decode("utf-8-sig")
    if (rows := rows_of_json(text)) is None:
        target.write(text.encode())  # lines already; a broken one is reported when it is read
        return
    for row in rows:
        target.write(json.dumps(row).encode() + b"\n")


def _options(kind: str, column: str) -> dict[str, Any]:
    if kind == "parquet":
        return {"columns": [column]}
    text = datasets.Features({column: datasets.Value("string")})  # 001 stays 001
    # Keep the word NA as text, and the first column as a column even if the last field is empty.
    return {"usecols": [column], "features": text, "keep_default_na": False, "index_col": False}


def _find_column(
    paths: tuple[str, ...], files: list[Path], kind: str, column: str | None, streaming: bool
) -> tuple[str, str]:
    """Return the text column and the top-level column that holds it; every file must have it."""
    columns_of = _parquet_columns if kind == "parquet" else _csv_columns
    tables = [columns_of(path, file, streaming) for path, file in zip(paths, files, strict=True)]
    if column is None:
        column = choose_column(paths[0], *tables[0])
    for path, (names, _) in zip(paths, tables, strict=True):
        if column not in names and column.split(".")[0] not in names:
            raise no_column(path, column, names)
    names, _ = tables[0]
    return column, column if column in names else column.split(".")[0]


def _parquet_columns(path: str, file: Path, streaming: bool) -> tuple[list[str], list[str]]:
    """Return the names of all columns and of the text columns."""
    schema, kinds = pyarrow.parquet.read_schema(file), ("string", "large_string", "string_view")
    return schema.names, [field.name for field in schema if str(field.type) in kinds]


def _csv_columns(path: str, file: Path, streaming: bool) -> tuple[list[str], list[str]]:
    """Return the names of all columns and of the text columns (those with more than numbers).

    If the file is streamed, only its first rows are checked.

    Raises:
        UserError: a separator other than a comma, or a row longer than the header, which pandas
            would misread.
    """
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(open_unpacked(file), encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(opened)
        names = next((row for row in rows if row), [])
        if not names:
            raise no_text(path)
        if len(names) == 1 and re.search(r"[;\t]", names[0]):
            raise UserError(f"{path}: no commas in the header {shortened(names[0])}: use commas")
        texts = set()
        for number, row in enumerate(rows, start=1):
            _check_width(path, number, row, len(names))
            if number <= SAMPLE:
                texts |= {name for name, text in zip(names, row, strict=False) if _is_word(text)}
            elif streaming:
                break
    return names, [name for name in names if name in texts]


def _check_width(path: str, number: int, row: list[str], columns: int) -> None:
    """Raise UserError for a row with more fields than columns, unless the extra ones are empty."""
    if any(field.strip() for field in row[columns:]):
        raise UserError(
            f"{path}: row {number} has {len(row)} fields, the header {columns}: quote texts that "
            "have commas in them"
        )


def _is_word(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return True
    return False


def choose_column(source: str, names: list[str], texts: list[str]) -> str:
    """Choose the text column if none was given: "text", or the only column of text."""
    if "text" in names:
        return "text"
    if len(texts) == 1:
        print(f"text column: {texts[0]}, the only one of {source} that is text")
        return texts[0]
    raise no_column(source, "text", names)


def no_text(source: str) -> UserError:
    """Build the error that reports a source without any text."""
    return UserError(f"cannot load {source}: there is no text in it")


def no_column(source: str, column: str, names: list[str]) -> UserError:
    """Build the error that reports a missing column."""
    return UserError(
        f"{source} has no column {column!r}; it has {', '.join(names)}: pass one as --text-column"
    )

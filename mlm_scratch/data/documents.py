"""Any source of text -> documents, one string each: a Hub data set, files, the bundled corpus."""

import copy
import glob
import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.distributed import split_dataset_by_node

from mlm_scratch.config import BUNDLED, TrainConfig
from mlm_scratch.data import corpus
from mlm_scratch.util.errors import UserError, shortened

TEXTS_PER_BATCH = 1000  # documents read, and passed to the tokenizer, at once
FILE_KINDS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# A byte-order mark is not text, and the word NA in a table is a word.
OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"encoding": "utf-8-sig"},
    "jsonl": {"encoding": "utf-8-sig"},
    "csv": {"keep_default_na": False},
}


@dataclass
class Documents:
    """The text column of a data set, one string per row, read on demand.

    Attributes:
        rows: the data set; with --streaming an IterableDataset, which has no length and is read
            from its source each time.
        column: the column with the text, dotted if nested.
        source: its name in error messages.
        json_lines: whether each row is a line of JSON, in the column "text", parsed here.
            `datasets` would fix the types of all columns by the first file: a list that is empty
            there would have to be empty everywhere.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    column: str
    source: str
    json_lines: bool = False

    def __post_init__(self) -> None:
        with errors_of(self.source):
            if self.json_lines:
                part: dict[str, list[str]] = next(self.rows.iter(TEXTS_PER_BATCH), {"text": []})
                first_rows = self._parsed(part["text"])
                names = list(dict.fromkeys(chain.from_iterable(first_rows)))
            else:
                names = self.rows.column_names or list(next(iter(self.rows), {}))
                first_rows = [dict.fromkeys(names)]
        # A flattened data set has a column that is itself named "answers.text".
        self.path = [self.column] if self.column in names else self.column.split(".")
        depth = len(self.path) if self.json_lines else 1  # the rest is checked row by row
        if not any(_has_path(row, self.path[:depth]) for row in first_rows):
            raise UserError(
                f"{self.source} has no column {self.column!r}; it has {', '.join(names)}: name one "
                "with --text-column"
            )
        if not self.json_lines:
            self.rows = self.rows.select_columns(self.path[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.batches())

    def batches(self) -> Iterator[list[str]]:
        """Yield the texts, TEXTS_PER_BATCH at a time.

        Between two batches, the state of a stream is that at the start of the next one.
        """
        name, seen = "text" if self.json_lines else self.path[0], 0
        with errors_of(self.source):
            for part in self.rows.iter(TEXTS_PER_BATCH):
                if self.json_lines:
                    texts = [self._pick(row, self.path) for row in self._parsed(part[name])]
                else:
                    texts = [self._pick(value, self.path[1:]) for value in part[name]]
                if any("\0" in text for text in texts):
                    number = seen + next(i for i, text in enumerate(texts) if "\0" in text)
                    raise UserError(
                        f"document {number} of {self.source} holds a NUL: it is not text"
                    )
                seen += len(texts)
                yield texts

    def part(self, number: int, parts: int) -> "Documents":
        """Return one of equal parts of a stream.

        A part has its own files if they can be divided evenly, else every parts-th document.
        """
        part = copy.deepcopy(self)  # parts that are read in turn would spoil each other's state
        part.rows = split_dataset_by_node(part.rows, number, parts)
        return part

    def _parsed(self, lines: list[str]) -> list[dict[str, Any]]:
        rows = []
        for line in filter(str.strip, lines):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(
                    f"cannot load {self.source}: {error} in the line {shortened(line)}"
                ) from error
            if not isinstance(rows[-1], dict):
                raise UserError(f"cannot load {self.source}: no JSON object: {shortened(line)}")
        return rows

    def _pick(self, value: Any, path: list[str]) -> str:
        """Follow the dotted path and join the lists on it.

        Answers are {"text": [...]} in older versions of `datasets`, [{"text": ...}, ...] in newer.
        """
        if isinstance(value, list):
            return " ".join(self._pick(item, path) for item in value)
        if value is None:
            return ""
        if path:
            if not isinstance(value, dict) or (path[0] not in value and not self.json_lines):
                raise UserError(
                    f"{self.source} has no column {self.column!r}: there is no {path[0]!r} inside"
                )
            return self._pick(value.get(path[0]), path[1:])  # a line of JSON may lack it
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\ud83d"
                raise UserError(
                    f"cannot load {self.source}: {shortened(value)} is not Unicode text"
                ) from error
            return value
        raise UserError(
            f"column {self.column!r} of {self.source} holds {type(value).__name__}, not text: "
            "name another --text-column"
        )


def _has_path(value: Any, path: list[str]) -> bool:
    if not path:
        return True
    if isinstance(value, list):
        return any(_has_path(item, path) for item in value)
    return isinstance(value, dict) and path[0] in value and _has_path(value[path[0]], path[1:])


def load_documents(config: TrainConfig) -> tuple[Documents, Documents | None]:
    """Load the text to train on and the text to evaluate on (None without evaluation).

    Raises:
        UserError: a text cannot be found, read or split.
    """
    documents = _load_training_documents(config)
    rows, source = documents.rows, documents.source
    # Read the start of a stream, so that most problems with it are reported now.
    if (next(documents.batches(), None) is None) if config.streaming else len(rows) == 0:
        raise UserError(f"{source} is empty: there is nothing to train on")

    if config.eval_file:
        return documents, _load_files(
            config.eval_file, config.text_column, "train", streaming=False
        )
    if config.eval_fraction == 0:
        return documents, None
    if len(rows) < 2:
        raise UserError(
            f"{source} has one document, so none can be held out: use --eval-fraction 0 or "
            "--eval-file"
        )
    test_size = max(1, int(len(rows) * config.eval_fraction))
    parts = rows.train_test_split(test_size=test_size, seed=config.seed)
    return (
        replace(documents, rows=parts["train"]),
        replace(documents, rows=parts["test"], source=f"the held-out part of {source}"),
    )


def _load_training_documents(config: TrainConfig) -> Documents:
    if config.train_file:
        return _load_files(config.train_file, config.text_column, config.split, config.streaming)
    if config.dataset == BUNDLED:
        if config.split != "train":
            raise UserError("--split: the bundled corpus has only the split train")
        rows = datasets.Dataset.from_list(list(corpus.rows()))
        rows = rows.to_iterable_dataset() if config.streaming else rows
        return Documents(rows, config.text_column, "the bundled corpus")
    source = f"data set {config.dataset}"
    rows = _load(
        source,
        config.dataset,
        config.dataset_config,
        split=config.split,
        streaming=config.streaming,
    )
    return Documents(rows, config.text_column, source)


def _load_files(paths: tuple[str, ...], column: str, split: str, streaming: bool) -> Documents:
    kinds = {_kind_of(Path(path)) for path in paths}
    if len(kinds) > 1:
        raise UserError(f"files of one kind at a time, not {', '.join(sorted(kinds))} together")
    kind = kinds.pop()
    with tempfile.TemporaryDirectory() as unpacked:
        if kind == "parquet":
            if streaming and any(path.endswith(".gz") for path in paths):
                raise UserError(f"{paths[0]}: .parquet.gz cannot be streamed: unpack it first")
            paths = tuple(_unpack(path, Path(unpacked)) for path in paths)
        # `datasets` reads a path as a pattern: x[1].txt would mean x1.txt.
        files = list(map(glob.escape, paths))
        rows = _load(
            paths[0],
            "text" if kind == "jsonl" else kind,
            data_files=files,
            split=split,
            streaming=streaming,
            **OPTIONS.get(kind, {}),
        )
    return Documents(rows, column, paths[0], json_lines=kind == "jsonl")


def _kind_of(path: Path) -> str:
    suffix = (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()
    if suffix not in FILE_KINDS:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(FILE_KINDS)} (or .gz)")
    if not path.is_file():
        raise UserError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    return FILE_KINDS[suffix]


def _unpack(path: str, directory: Path) -> str:
    """Return the path of the same file uncompressed; `datasets` unpacks all kinds but parquet."""
    if not path.endswith(".gz"):
        return path
    unpacked = directory / f"{len(list(directory.iterdir()))}-{Path(path).stem}"
    try:
        with gzip.open(path) as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot load {path}: {error}") from error
    return str(unpacked)


def _load(source: str, *args: Any, **kwargs: Any) -> datasets.Dataset | datasets.IterableDataset:
    with errors_of(source):
        return datasets.load_dataset(*args, **kwargs)


@contextmanager
def errors_of(source: str) -> Iterator[None]:
    """Turn what `datasets` raises while it reads `source` into a UserError."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the message below is enough
    try:
        yield
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        OSError,
        ValueError,
        EOFError,
        RuntimeError,  # a data set with a loading script
        TypeError,  # a column that has another type in another file
    ) as error:
        if "SchemaInferenceError" in repr(error.__cause__):  # raised for a file without any row
            raise UserError(f"cannot load {source}: there is no text in it") from error
        while error.__cause__ is not None:  # datasets wraps the parser's own error
            error = error.__cause__
        raise UserError(f"cannot load {source}: {type(error).__name__}: {error}") from error

"""Any source of text -> rows of token ids in memory-mapped files.

    documents    a Hub data set, files or the bundled corpus: one string per row of it
    tokenizer    the ids of each document, special tokens included
    grouping     "blocks": one long stream, cut every block_size ids;
                 "lines": one document per row, cut at block_size

The ids go to a flat file as they come, in the smallest integer type that holds the vocabulary; only
a part of the text and of the ids is held in memory at a time. The finished directory is kept under
a key of content, tokenizer and settings; the next run with the same three starts at once.
"""

import copy
import glob
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets.distributed import split_dataset_by_node
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import BUNDLED, TrainConfig
from mlm_scratch.data import corpus
from mlm_scratch.run.checkpoint import checksum, sync
from mlm_scratch.util.errors import UserError, shortened
from mlm_scratch.util.progress import progress_bar

ROWS_VERSION = 2  # to be counted up when other rows are made of the same text
TEXTS_PER_BATCH = 1000  # read and given to the tokenizer at once; it spreads them over the cores
FILE_KINDS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


# ---- Documents: one string each ------------------------------------------------------------------


@dataclass
class Documents:
    """The text column of a data set, one string per row, read when it is asked for.

    With --streaming rows is an IterableDataset: without a length, read from its source each time.

    json_lines: each row is a line of JSON, in the column "text". `datasets` could take the lines
        apart, but wants all columns of all files to have the types that it saw in the first: a list
        that is empty there would have to be empty everywhere.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    column: str
    source: str
    json_lines: bool = False

    def __post_init__(self) -> None:
        with _told_in_one_line(self.source):
            if self.json_lines:
                part: dict[str, list[str]] = next(self.rows.iter(TEXTS_PER_BATCH), {"text": []})
                first_rows = self._parsed(part["text"])
                names = list(dict.fromkeys(chain.from_iterable(first_rows)))
            else:
                names = self.rows.column_names or list(next(iter(self.rows), {}))
                first_rows = [dict.fromkeys(names)]
        # A flattened data set has a column that is itself called "answers.text".
        self.path = [self.column] if self.column in names else self.column.split(".")
        depth = len(self.path) if self.json_lines else 1  # the rest is seen row by row
        if not any(_leads_somewhere(row, self.path[:depth]) for row in first_rows):
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
        """The texts, TEXTS_PER_BATCH at a time: between two batches the state of a stream is that
        at the beginning of the next one."""
        name, seen = "text" if self.json_lines else self.path[0], 0
        with _told_in_one_line(self.source):
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
        """One of equal parts of a stream: its own files where they can be shared out evenly, or
        else every so many-th document."""
        part = copy.deepcopy(self)  # else parts that are read in turn spoil each other's state
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
        """Follow the dotted path. Lists may stand anywhere on it: {"text": [...]} as older versions
        of `datasets` store answers, or [{"text": ...}, ...] as newer ones do."""
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
            f"column {self.column!r} of {self.source} holds {type(value).__name__}, not text: name "
            "another --text-column"
        )


def _leads_somewhere(value: Any, path: list[str]) -> bool:
    if not path:
        return True
    if isinstance(value, list):
        return any(_leads_somewhere(item, path) for item in value)
    return (
        isinstance(value, dict) and path[0] in value and _leads_somewhere(value[path[0]], path[1:])
    )


def load_documents(config: TrainConfig) -> tuple[Documents, Documents | None]:
    """Load the training text and the text to evaluate on (None without evaluation).

    Raises UserError for what cannot be found, read or split.
    """
    if config.train_file:
        documents = _load_files(
            config.train_file, config.text_column, config.split, config.streaming
        )
    elif config.dataset == BUNDLED:
        if config.split != "train":
            raise UserError("--split: the bundled corpus has only the split train")
        rows = datasets.Dataset.from_list(list(corpus.rows()))
        rows = rows.to_iterable_dataset() if config.streaming else rows
        documents = Documents(rows, config.text_column, "the bundled corpus")
    else:
        source = f"data set {config.dataset}"
        rows = _load(
            source,
            config.dataset,
            config.dataset_config,
            split=config.split,
            streaming=config.streaming,
        )
        documents = Documents(rows, config.text_column, source)
    rows, source = documents.rows, documents.source
    # Of a stream the beginning is read, so that most of what can be wrong with it is told now.
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


def _load_files(paths: tuple[str, ...], column: str, split: str, streaming: bool) -> Documents:
    kinds = set()
    for path in map(Path, paths):
        suffix = (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()
        if suffix not in FILE_KINDS:
            raise UserError(f"{path}: unknown kind of file; use {', '.join(FILE_KINDS)} (or .gz)")
        if not path.is_file():
            raise UserError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        kinds.add(FILE_KINDS[suffix])
    if len(kinds) > 1:
        raise UserError(f"files of one kind at a time, not {', '.join(sorted(kinds))} together")
    kind = kinds.pop()
    # A byte-order mark is no text, and the word NA in a table is a word.
    of_kind: dict[str, dict[str, Any]] = {
        "text": {"encoding": "utf-8-sig"},
        "jsonl": {"encoding": "utf-8-sig"},
        "csv": {"keep_default_na": False},
    }
    options = of_kind.get(kind, {})
    with tempfile.TemporaryDirectory() as unpacked:
        if kind == "parquet":
            if streaming and any(path.endswith(".gz") for path in paths):
                raise UserError(f"{paths[0]}: .parquet.gz cannot be streamed: unpack it first")
            paths = tuple(_unpack(path, Path(unpacked)) for path in paths)
        # The library reads a path as a pattern: x[1].txt would mean x1.txt.
        files = list(map(glob.escape, paths))
        rows = _load(
            paths[0],
            "text" if kind == "jsonl" else kind,
            data_files=files,
            split=split,
            streaming=streaming,
            **options,
        )
    return Documents(rows, column, paths[0], json_lines=kind == "jsonl")


def _unpack(path: str, directory: Path) -> str:
    """The path of the same file, uncompressed: the library does this for all kinds but parquet."""
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
    with _told_in_one_line(source):
        return datasets.load_dataset(*args, **kwargs)


@contextmanager
def _told_in_one_line(source: str) -> Iterator[None]:
    """Turn what `datasets` raises while it reads into a UserError."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, below
    try:
        yield
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        OSError,
        ValueError,
        EOFError,
        RuntimeError,  # a data set that is a script
        TypeError,  # a column that has another type in another file
    ) as error:
        if "SchemaInferenceError" in repr(error.__cause__):  # what a file without any row leads to
            raise UserError(f"cannot load {source}: there is no text in it") from error
        while error.__cause__ is not None:  # datasets wraps the parser's own error
            error = error.__cause__
        raise UserError(f"cannot load {source}: {type(error).__name__}: {error}") from error


# ---- Rows of token ids ---------------------------------------------------------------------------


@dataclass
class TokenRows:
    """Rows of token ids, on disk: row i is tokens[starts[i] : starts[i + 1]].

    tokens: (total,) ids, memory-mapped. starts: (rows + 1,) int64.
    gap_before: (total,) bool, true where the text has a gap before the token; only with whole
    words. text_digest: says whether two runs have read the same text.
    """

    tokens: np.ndarray
    starts: np.ndarray
    gap_before: np.ndarray | None = None
    text_digest: str = ""

    def __len__(self) -> int:
        return len(self.starts) - 1


def prepare_rows(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> TokenRows:
    """Tokenize and group `documents`, or find them already prepared.

    Raises UserError if there is not enough text for one row.
    """
    text_digest = _text_digest(documents)
    directory = cache_dir() / _cache_key(text_digest, tokenizer, config)
    if directory.exists() and not _is_whole(directory):
        shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():  # asked again: another run may have finished it meanwhile
        largest_id = max(tokenizer.get_vocab().values())
        watched = progress_bar(documents, desc="tokenizing", unit=" documents", leave=False)
        write_rows(directory, tokenize(watched, tokenizer, config), largest_id)
    rows = _open_rows(directory, config)
    rows.text_digest = text_digest
    if len(rows) == 0:
        raise UserError(
            f"{documents.source} gives {len(rows.tokens)} tokens, too few for one row of "
            f"{config.block_size}: use more text, a smaller --block-size or --grouping lines"
        )
    return rows


def cache_dir() -> Path:
    """Where prepared rows are kept: $MLM_SCRATCH_CACHE or ~/.cache/mlm_scratch. Safe to delete."""
    return Path(os.environ.get("MLM_SCRATCH_CACHE") or Path.home() / ".cache" / "mlm_scratch")


def _text_digest(documents: Documents) -> str:
    digest, empty = hashlib.sha256(), True
    for text in documents:
        empty = empty and not text.strip()
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)  # the length keeps documents apart
    if empty:
        raise UserError(f"{documents.source} holds no text: every document is empty")
    return digest.hexdigest()


def _cache_key(text_digest: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> str:
    """A digest of all that decides what the files contain."""
    digest = hashlib.sha256()
    settings = {
        "version": ROWS_VERSION,
        "text": text_digest,
        "block_size": config.block_size if config.grouping == "lines" else None,
        "grouping": config.grouping,
        "whole_word": config.whole_word,
        "vocabulary": len(tokenizer),
    }
    digest.update(json.dumps(settings).encode())
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # what the last call set is no part of it
        tokenizer.backend_tokenizer.no_padding()
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        digest.update(json.dumps([repr(tokenizer), sorted(tokenizer.get_vocab().items())]).encode())
    return digest.hexdigest()[:32]


def write_rows(
    directory: Path, tokenized: Iterable[tuple[list[int], list[bool]]], largest_id: int
) -> None:
    """Write (ids, gap_before) of each document into `directory`, which appears whole or not at
    all. Raises UserError where nothing can be written."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=directory.parent))
    except OSError as error:
        raise UserError(f"cannot write prepared text below {directory.parent}: {error}") from error
    try:
        dtype = np.dtype(np.uint16 if largest_id < 2**16 else np.uint32)
        _write_flat(unfinished, tokenized, dtype)
        checksums = {path.name: checksum(path) for path in unfinished.iterdir()}
        meta = {"dtype": dtype.name, "checksums": checksums}
        (unfinished / "meta.json").write_text(json.dumps(meta))
        for path in unfinished.iterdir():
            sync(path)
        os.rename(unfinished, directory)
    except OSError as error:
        if not _is_whole(directory):  # else another run has just finished the same directory
            raise UserError(f"cannot write below {directory.parent}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_flat(
    directory: Path, tokenized: Iterable[tuple[list[int], list[bool]]], dtype: np.dtype
) -> None:
    tokenized, end = iter(tokenized), 0
    with (
        open(directory / "tokens.bin", "wb") as tokens_file,
        open(directory / "starts.bin", "wb") as starts_file,
        open(directory / "gaps.bin", "wb") as gaps_file,
    ):
        np.zeros(1, np.int64).tofile(starts_file)
        while documents := list(islice(tokenized, TEXTS_PER_BATCH)):
            # "I" (32 bits) takes a list three times as fast as "H" or numpy does.
            tokens = array("I")
            for ids, gap_before in documents:
                tokens.fromlist(ids)
                gaps_file.write(bytes(gap_before))
            np.frombuffer(tokens, np.uint32).astype(dtype).tofile(tokens_file)
            starts = end + np.cumsum([len(ids) for ids, _ in documents])  # (documents,)
            starts.tofile(starts_file)
            end = int(starts[-1])


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield (ids, gap_before) of each document, special tokens included.

    gap_before is empty unless config.whole_word. With grouping "lines" a document is cut at
    block_size and one without text is left out; in a stream it leaves its special tokens, as in
    the reference.
    """
    lines, whole_word = config.grouping == "lines", config.whole_word
    if whole_word and not tokenizer.is_fast:
        raise UserError(
            f"--whole-word: the tokenizer of {config.model} does not tell where its tokens lie in "
            "the text"
        )
    texts = iter(documents)
    if lines:
        texts = (text for text in texts if text.strip())
    while batch := list(islice(texts, TEXTS_PER_BATCH)):
        encoding = tokenizer(
            batch,
            truncation=lines,
            max_length=config.block_size if lines else None,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=whole_word,
            verbose=False,  # no warning about documents over the model's limit: they are cut here
        )
        for number, ids in enumerate(encoding["input_ids"]):
            spans = encoding["offset_mapping"][number] if whole_word else []
            yield ids, _gaps(batch[number], spans)
    if lines and tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # not to be saved with the model


def _gaps(text: str, spans: list[tuple[int, int]]) -> list[bool]:
    """For each token, whether there is a gap before it: its span of characters begins after the end
    of the one before, or (some tokenizers count the gap in) with a space. Pieces of one character,
    as byte-level BPE makes of "’" or a wide space, have the same span."""
    return [
        start > end_before or (start > start_before and text[start : start + 1].isspace())
        for (start_before, end_before), (start, _) in pairwise([(-1, -1), *spans])
    ]


def _is_whole(directory: Path) -> bool:
    """Whether the files are as they were written. Reading them takes less time than reading the
    text, which has to be done to know whether it is still the same."""
    try:
        checksums = json.loads((directory / "meta.json").read_text())["checksums"]
        whole = all(checksum(directory / name) == noted for name, noted in checksums.items())
        return whole and checksums.keys() == {"tokens.bin", "starts.bin", "gaps.bin"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _open_rows(directory: Path, config: TrainConfig) -> TokenRows:
    dtype = json.loads((directory / "meta.json").read_text())["dtype"]
    tokens = _open_flat(directory / "tokens.bin", dtype)  # (total,)
    if config.grouping == "lines":
        starts = _open_flat(directory / "starts.bin", np.int64)  # (rows + 1,)
    else:
        rows = len(tokens) // config.block_size  # what is left over is shorter than a block
        starts = np.arange(rows + 1, dtype=np.int64) * config.block_size  # (rows + 1,)
    gap_before = _open_flat(directory / "gaps.bin", bool) if config.whole_word else None
    return TokenRows(tokens, starts, gap_before)


def _open_flat(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    # As a plain array: the class memmap adds its own work to every look-up.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

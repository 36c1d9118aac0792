"""Any source of text -> documents, one string each: a Hub data set, files, the bundled corpus."""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from huggingface_hub import resolve_revision

from mlm_scratch.config import BUNDLED, HELD_OUT, TextSettings, TrainConfig
from mlm_scratch.data import corpus
from mlm_scratch.data.files import (
    FILE_KINDS,
    SAMPLE,
    Rows,
    cache_of,
    choose_column,
    contents_key,
    errors_of,
    load_files,
    no_column,
)
from mlm_scratch.data.tables import kind_of
from mlm_scratch.hf.hub import why_not_found
from mlm_scratch.util.errors import UserError, shortened
from mlm_scratch.util.progress import late_bar

VALIDATION = "validation"  # `datasets` calls a split so whose files are named dev, val or valid
COMMIT = "[0-9a-f]{40}"
MASKINGS = 8  # of each sentence that the bundled corpus leaves out
TEXTS_PER_BATCH = 1000  # documents per read and per call of the tokenizer


@dataclass
class Documents:
    """The text column of a data set, one string per row, read on demand.

    Attributes:
        rows: the data set; with --streaming an IterableDataset, which has no length and is read
            from its source each time.
        column: name of the text column, dotted if nested; None: the only column of text.
        source: the name of the data set in messages.
        json_lines: whether each row is a line of JSON, in the column "text", parsed here.
            `datasets` would infer the types of all columns from the first file: a list that is
            empty there would have to be empty everywhere.
        version: the commit, or a digest of the contents, that was loaded.
        held_out: whether these documents were split off from the training text for evaluation.
        answers: sentences with an answer in brackets that ask for what the text says, by the name
            of their group.
    """

    rows: Rows
    column: str | None
    source: str
    json_lines: bool = False
    version: str = ""
    held_out: bool = False
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)  # to the text in a row; empty: find it

    def __post_init__(self) -> None:
        if self.path:
            return
        with errors_of(self.source):
            if self.json_lines:
                self.path = self._json_path()
                return
            names = self.rows.column_names or list(next(iter(self.rows), {}))
            if self.column is None:
                features = self.rows.features or {}
                is_text = {name for name in names if features.get(name) == datasets.Value("string")}
                self.column = choose_column(self.source, names, [*is_text])
        # A flattened data set has a column that is itself named "answers.text".
        self.path = [self.column] if self.column in names else self.column.split(".")
        if self.path[0] not in names:
            raise no_column(self.source, self.column, names)
        self.rows = self.rows.select_columns(self.path[0])
        if isinstance(self.rows, datasets.Dataset):
            # Without its neighbours: a column "answers" has ids, scores and links, too.
            flat = self.rows.flatten()
            if self.column in flat.column_names:
                self.rows, self.path = flat.select_columns(self.column), [self.column]

    def _json_path(self) -> list[str]:
        """Find the column in the lines of JSON. One line that has the column is enough."""
        names: dict[str, None] = {}  # a set that keeps its order
        for part in self.rows.iter(SAMPLE):
            rows = self._parsed(part["text"])
            names |= dict.fromkeys(chain.from_iterable(rows))
            if self.column is None:
                texts = {name: None for row in rows for name in row if isinstance(row[name], str)}
                self.column = choose_column(self.source, [*names], [*texts])
            for row in rows:
                if self.column in row:  # also where it is itself named "answers.text"
                    return [self.column]
                if _has_path(row, path := self.column.split(".")):
                    return path
        raise no_column(self.source, self.column or "text", [*names])

    @property
    def commit(self) -> str | None:
        """The Hub commit that was loaded; None for a local source."""
        return self.version if re.fullmatch(COMMIT, self.version) else None

    @property
    def label(self) -> str:
        """The source with its version, for run.json and for people."""
        return f"{self.source} (version {self.version[:12]})" if self.version else self.source

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.batches())

    def batches(self) -> Iterator[list[str]]:
        """Yield the texts, TEXTS_PER_BATCH at a time.

        Between two batches, the state of a stream points to the start of the next batch.
        """
        name, seen = "text" if self.json_lines else self.path[0], 0
        with errors_of(self.source):
            for part in self.rows.iter(TEXTS_PER_BATCH):
                values = self._parsed(part[name]) if self.json_lines else part[name]
                path = self.path if self.json_lines else self.path[1:]
                texts = []
                for number, value in enumerate(values, start=seen + 1):
                    texts.append(self._text(value, path, number))
                seen += len(texts)
                yield texts

    def _text(self, value: Any, path: list[str], number: int) -> str:
        """Return the text of row `number`, counted from 1."""
        try:
            text = self._pick(value, path)
            text.encode()
        except _NoTextError as error:
            advice = ": pass another --text-column" if number == 1 else ""
            raise UserError(
                f"row {number} of {self.source}: column {self.column!r} holds {error}, not text"
                f"{advice}"
            ) from error
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\\ud83d"
            raise UserError(
                f"cannot load {self.source}: {shortened(text)} in row {number} is not Unicode text"
            ) from error
        if "\0" in text:
            raise UserError(
                f"row {number} of {self.source} contains a NUL character: it is not text"
            )
        return text

    def shard(self, number: int, shards: int) -> "Documents":
        """Return shard `number` of a stream that is divided into equal ones.

        A shard has its own files if they can be divided evenly, else every shards-th document.
        """
        shard = copy.deepcopy(self)  # shards that share a state would overwrite it in turn
        shard.rows = split_dataset_by_node(shard.rows, number, shards)
        return shard

    def _parsed(self, lines: list[str]) -> list[dict[str, Any]]:
        rows = []
        for line in filter(str.strip, lines):
            try:
                rows.append(json.loads(line.removeprefix("\ufeff")))
            except ValueError as error:
                raise UserError(
                    f"cannot load {self.source}: {error} in the line {shortened(line)}"
                ) from error
            if not isinstance(rows[-1], dict):
                raise UserError(f"cannot load {self.source}: not a JSON object: {shortened(line)}")
        return rows

    def _pick(self, value: Any, path: list[str]) -> str:
        """Follow the dotted path and join the lists on it.

        Answers are {"text": [...]} in older versions of `datasets`, [{"text": ...}, ...] in newer.
        """
        if isinstance(value, list):
            return " ".join(self._pick(item, path) for item in value)
        if value is None or value != value:  # NaN is what pandas writes for a missing value
            return ""
        if path:
            if not isinstance(value, dict) or (path[0] not in value and not self.json_lines):
                raise UserError(
                    f"{self.source} has no column {self.column!r}: there is no {path[0]!r} inside"
                )
            return self._pick(value.get(path[0]), path[1:])  # a line of JSON may lack it
        if isinstance(value, str):
            return value.removeprefix("\ufeff")  # a byte-order mark
        raise _NoTextError(type(value).__name__)


class _NoTextError(Exception):
    """The value of a row is not text; the message is the name of its type."""


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
    column, evaluation = config.text.text_column, config.evaluation
    if config.text.train_file and column not in (None, "text"):
        files = config.text.train_file + sum(evaluation.files_by_name.values(), ())
        if all(kind_of(path, FILE_KINDS) == "text" for path in files):
            raise no_column(files[0], column, ["text"])
    documents = _load_training_documents(config)
    rows, source = documents.rows, documents.source
    # Read the start of a stream, so that most problems with it are reported now.
    if (next(documents.batches(), None) is None) if config.text.streaming else len(rows) == 0:
        raise UserError(f"{source} is empty: there is nothing to train on")

    if evaluation.eval_file:
        first, *_ = evaluation.files_by_name.values()
        return documents, _documents_of(first, column, "train", False)
    if (split := _evaluation_split(config)) is not None:
        return documents, split
    fraction = HELD_OUT if evaluation.eval_fraction is None else evaluation.eval_fraction
    if fraction == 0:
        return documents, None
    if len(rows) < 2:
        raise UserError(
            f"{source} has one document, so none can be held out: use --eval-fraction 0 or "
            "--eval-file"
        )
    test_size = max(1, int(len(rows) * fraction))
    parts = rows.train_test_split(test_size=test_size, seed=config.optimization.seed)
    return (
        replace(documents, rows=parts["train"]),
        replace(
            documents, rows=parts["test"], source=f"the held-out part of {source}", held_out=True
        ),
    )


def load_more_to_evaluate_on(config: TrainConfig) -> dict[str, Documents]:
    """Load the texts that --eval-file names after the first one, by their names."""
    column, named = config.text.text_column, [*config.evaluation.files_by_name.items()]
    return {name: _documents_of(paths, column, "train", False) for name, paths in named[1:]}


def _load_training_documents(config: TrainConfig) -> Documents:
    text = config.text
    if text.train_file:
        return _documents_of(text.train_file, text.text_column, text.split, text.streaming)
    if text.dataset == BUNDLED:
        if text.split != "train":
            raise UserError("--split: the bundled corpus has only the split train")
        rows = datasets.Dataset.from_list(list(corpus.rows()))
        rows = rows.to_iterable_dataset() if text.streaming else rows
        return Documents(rows, text.text_column, "the bundled corpus")
    source = f"data set {text.dataset}"
    with errors_of(source):
        rows, version = _load_dataset(text, config.model.revision)
    return Documents(rows, text.text_column, source, version=version)


def _evaluation_split(config: TrainConfig) -> Documents | None:
    """Load the evaluation split of the data set; None if there is none to use."""
    if config.text.dataset is None or config.text.train_file:
        return None
    if config.evaluation.eval_split is None and config.evaluation.eval_fraction is not None:
        return None
    if config.text.dataset == BUNDLED:
        return _unseen_documents()
    split = config.evaluation.eval_split or VALIDATION
    text = replace(config.text, split=split, streaming=False)
    source = f"the split {split} of data set {text.dataset}"
    with errors_of(source):
        try:
            rows, version = _load_dataset(text, config.model.revision)
        except ValueError as error:
            if config.evaluation.eval_split is None and f'Unknown split "{split}"' in str(error):
                return None
            raise
    return Documents(rows, config.text.text_column, source, version=version)


def _unseen_documents() -> Documents:
    """Return the sentences that the bundled corpus leaves out, MASKINGS times each.

    They are few: masked once, they would give some 400 tokens to predict.
    """
    sentences = [sentence for sentence, _ in corpus.unseen_sentences()]
    rows = datasets.Dataset.from_dict({"text": sentences * MASKINGS})
    source = f"{len(sentences)} sentences that the corpus leaves out, {MASKINGS} times each"
    answers = {
        "reporting": tuple(corpus.unseen_prompts(chose=False)),
        "choosing": tuple(corpus.unseen_prompts(chose=True)),
    }
    return Documents(rows, "text", source, answers=answers)


def count_shared(documents: Documents, others: Documents) -> int:
    """Count the `others` that stand word for word among `documents`, too; empty ones do not."""
    wanted = Counter(map(hash, filter(str.strip, others)))  # 64 bits of each instead of its text
    bar = late_bar(documents, desc="comparing with the evaluation text", unit=" documents")
    return sum(wanted.pop(hash(text), 0) for text in bar)


def _documents_of(
    paths: tuple[str, ...], column: str | None, split: str, streaming: bool
) -> Documents:
    rows, column, version = load_files(paths, column, split, streaming)
    source = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    json_lines = "json" in kind_of(paths[0], FILE_KINDS)
    return Documents(rows, column, source, json_lines=json_lines, version=version)


def _load_dataset(text: TextSettings, revision: str | None) -> tuple[Rows, str]:
    """Load a data set from a Hub id or a directory; return the data set and its version.

    `revision` is the model's; it is used if none is given for the data set.
    """
    assert text.dataset is not None
    directory = Path(text.dataset)
    options: dict[str, Any] = {"split": text.split, "streaming": text.streaming}
    if directory.is_file():
        raise UserError(f"--dataset {text.dataset} is a file: use --train-file")
    if not directory.is_dir():
        revision = text.dataset_commit or text.dataset_revision or revision
        if text.streaming:  # a stream does not record its commit
            revision = resolve_revision(
                text.dataset, revision=revision, repo_type="dataset"
            ).resolved
        try:
            rows = datasets.load_dataset(
                text.dataset, text.dataset_config, revision=revision, **options
            )
        except Exception as error:
            if reason := why_not_found("data set", text.dataset, error):
                raise UserError(f"cannot load data set {text.dataset}: {reason}") from error
            raise
        return rows, str(revision) if text.streaming else _commit_of(rows, text.dataset)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    version = "" if text.streaming else contents_key("directory", files)
    if (directory / "state.json").is_file():  # written by Dataset.save_to_disk
        return _slice_of(datasets.load_from_disk(text.dataset), text), version
    own_cache = str(cache_of(version))
    rows = datasets.load_dataset(text.dataset, text.dataset_config, cache_dir=own_cache, **options)
    return rows, version


def _commit_of(rows: Rows, name: str) -> str:
    """Return the Hub commit that a data set was loaded from.

    Offline, `datasets` loads the newest cache entry of this name. An entry from the Hub lies in a
    directory named after its commit; an entry from a local directory of the same name does not.
    """
    names = {Path(file["filename"]).parent.name for file in rows.cache_files}
    if any(re.fullmatch(COMMIT, name) is None for name in names):
        raise UserError(
            f"data set {name} is not cached, and the Hub does not answer (what is cached under "
            "this name comes from a local directory)"
        )
    return names.pop() if names else ""


def _slice_of(rows: datasets.Dataset, text: TextSettings) -> Rows:
    """Apply the slice in --split to a data set without splits."""
    (part,) = datasets.ReadInstruction.from_spec(text.split).to_absolute({"train": len(rows)})
    rows = rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))
    return rows.to_iterable_dataset() if text.streaming else rows

"""Documents -> rows of token ids in memory-mapped files.

    documents    one string each (documents.py)
    tokenizer    the ids of each document, special tokens included
    grouping     "blocks": concatenate them and chunk every block_size ids;
                 "lines": one document per row, truncated to block_size

The ids are written to a flat file batch by batch, in the smallest integer type that fits the
vocabulary; only one batch of text and ids is in memory at a time. The finished directory is cached
under a key of content, tokenizer and settings; the next run with the same key starts immediately.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.documents import TEXTS_PER_BATCH, Documents
from mlm_scratch.loader import Collator, Loader, TokenRows, epoch_order
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.files import cache_dir, checksum, publish
from mlm_scratch.util.progress import late_bar

ROWS_VERSION = 3  # increment when the same text yields different rows
META = "meta.json"
LONG_WORD = 16  # tokens


class Source:
    """What a run trains on: rows on the disk, or a stream (stream.py).

    Attributes:
        complete: True if each rank has the rows of all ranks, False if it has only its own.
        text_digest: equal for two runs that read the same text.
    """

    complete = True
    text_digest = ""

    def __len__(self) -> int:
        """Count the rows."""
        raise NotImplementedError

    def loader(self, collator: Collator, **settings: Any) -> Loader:
        """Build the Loader of these rows; `settings` are its keyword arguments."""
        raise NotImplementedError

    def first_rows(self, n: int, seed: int) -> tuple[TokenRows, np.ndarray] | None:
        """Return the first n rows of a run and their indices, (n,), if they can be read ahead."""
        return None

    def start(self) -> None:
        """Start the worker processes that read ahead, if there are any."""

    def close(self) -> None:
        """Stop the worker processes."""


@dataclass
class PreparedRows(TokenRows, Source):
    """Rows of token ids, memory-mapped."""

    text_digest: str = ""

    def loader(self, collator: Collator, **settings: Any) -> Loader:
        """Build the Loader of chapter 2."""
        return Loader(self, collator, **settings)

    def first_rows(self, n: int, seed: int) -> tuple[TokenRows, np.ndarray]:
        """Return these rows and the indices of the first n of epoch 0, (n,)."""
        return self, epoch_order(len(self), seed, epoch=0)[:n]


def prepare_rows(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> PreparedRows:
    """Tokenize and group `documents`, or find the result in the cache.

    Raises:
        UserError: there is not enough text for one row.
    """
    text_digest = _text_digest(documents)
    directory = cache_dir() / _cache_key(text_digest, tokenizer, config)
    if directory.exists() and not _is_intact(directory):
        shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():  # checked again: another run may have finished it meanwhile
        largest_id = max(tokenizer.get_vocab().values())
        bar = late_bar(documents, desc="tokenizing", unit=" documents")
        write_rows(directory, tokenize(bar, tokenizer, config), largest_id)
    rows = _open_rows(directory, config)
    rows.text_digest = text_digest
    if len(rows) == 0:
        raise UserError(
            f"{documents.source} gives {len(rows.tokens)} tokens, too few for one row of "
            f"{config.text.block_size}: use more text, a smaller --block-size or --grouping lines"
        )
    if rows.gap_before is not None:
        _warn_of_long_words(rows.gap_before[: rows.starts[:TEXTS_PER_BATCH][-1]])
    return rows


def _warn_of_long_words(gap_before: np.ndarray) -> None:
    """Print a warning if most words, given their gaps (tokens,), are as long as sentences."""
    lengths = np.diff(np.flatnonzero(gap_before), append=len(gap_before))  # (words,) tokens
    if np.mean(lengths > LONG_WORD) > 0.5:
        print(
            f"warning: --whole-word: most words of the text have more than {LONG_WORD} tokens (is "
            "it written without spaces?): each of them is masked completely or not at all",
            file=sys.stderr,
        )


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield (ids, gap_before) of each document, special tokens included.

    gap_before is empty without whole-word masking. With grouping "lines", documents are truncated
    to block_size and those without text are skipped; with "blocks", a document without text still
    contributes its special tokens, as in the tutorial.
    """
    lines, whole_word = config.text.grouping == "lines", config.masking.whole_word
    if whole_word and not tokenizer.is_fast:
        raise UserError(
            f"--whole-word: the tokenizer of {config.model.name} does not report where its tokens "
            "are in the text"
        )
    texts = iter(documents)
    if lines:
        texts = (text for text in texts if text.strip())
    while batch := list(islice(texts, TEXTS_PER_BATCH)):
        encoding = tokenizer(
            batch,
            truncation=lines,
            max_length=config.text.block_size if lines else None,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=whole_word,
            verbose=False,  # no warning about documents over the model's limit: they are chunked
        )
        for number, ids in enumerate(encoding["input_ids"]):
            spans = encoding["offset_mapping"][number] if whole_word else []
            yield ids, _gaps(batch[number], spans)
    if lines and tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # or it would be saved with the model


def _gaps(text: str, spans: list[tuple[int, int]]) -> list[bool]:
    """Return for each token whether a word may start there: after a space, or where the text does.

    The space lies between the token's character span and the previous span or, since some
    tokenizers include spaces, at the start of the token's span. Other characters between two spans
    were dropped by the tokenizer, such as accents or soft hyphens. The pieces of one character,
    such as "’" or a wide space in byte-level BPE, have the same span.
    """
    gaps = []
    for (start_before, end_before), (start, _) in pairwise([(-1, -1), *spans]):
        skipped = text[max(end_before, 0) : start]
        includes_space = start > start_before and text[start : start + 1].isspace()
        gaps.append(end_before < 0 or any(map(str.isspace, skipped)) or includes_space)
    return gaps


# ---- The cache -----------------------------------------------------------------------------------


def _text_digest(documents: Documents) -> str:
    digest, empty = hashlib.sha256(), True
    for text in late_bar(documents, desc="reading", unit=" documents"):
        empty = empty and not text.strip()
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)  # the length separates documents
    if empty:
        raise UserError(f"{documents.source} contains no text: every document is empty")
    return digest.hexdigest()


def _cache_key(text_digest: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> str:
    """Digest everything that determines the contents of the files."""
    digest = hashlib.sha256()
    settings = {
        "version": ROWS_VERSION,
        "text": text_digest,
        "block_size": config.text.block_size if config.text.grouping == "lines" else None,
        "grouping": config.text.grouping,
        "whole_word": config.masking.whole_word,
        "vocabulary": len(tokenizer),
    }
    digest.update(json.dumps(settings).encode())
    if tokenizer.is_fast:
        digest.update(_as_loaded(tokenizer.backend_tokenizer).encode())
    else:
        digest.update(json.dumps([repr(tokenizer), sorted(tokenizer.get_vocab().items())]).encode())
    return digest.hexdigest()[:32]


def _as_loaded(backend: Tokenizer) -> str:
    """Serialize a tokenizer without the truncation and padding of its last call, which it keeps."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    serialized = backend.to_str()
    if truncation is not None:
        backend.enable_truncation(**truncation)
    if padding is not None:
        backend.enable_padding(**padding)
    return str(serialized)


def write_rows(
    directory: Path, tokenized: Iterable[tuple[list[int], list[bool]]], largest_id: int
) -> None:
    """Write (ids, gap_before) of each document; `directory` appears complete or not at all.

    Raises:
        UserError: the directory cannot be written.
    """
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
        (unfinished / META).write_text(json.dumps(meta))
        publish(unfinished, directory)
    except OSError as error:
        if not _is_intact(directory):  # else another run has just finished the same directory
            raise UserError(f"cannot write to {directory.parent}: {error}") from error
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
            # array("I") (32 bits) copies a list three times as fast as array("H") or numpy.
            tokens = array("I")
            for ids, gap_before in documents:
                tokens.fromlist(ids)
                gaps_file.write(bytes(gap_before))
            np.frombuffer(tokens, np.uint32).astype(dtype).tofile(tokens_file)
            starts = end + np.cumsum([len(ids) for ids, _ in documents])  # (documents,)
            starts.tofile(starts_file)
            end = int(starts[-1])


def _is_intact(directory: Path) -> bool:
    """Whether the checksums match. Checking them is faster than computing the text's digest."""
    try:
        checksums = json.loads((directory / META).read_text())["checksums"]
        intact = all(checksum(directory / name) == noted for name, noted in checksums.items())
        return intact and checksums.keys() == {"tokens.bin", "starts.bin", "gaps.bin"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _open_rows(directory: Path, config: TrainConfig) -> PreparedRows:
    dtype = json.loads((directory / META).read_text())["dtype"]
    tokens = _open_flat(directory / "tokens.bin", dtype)  # (total,)
    if config.text.grouping == "lines":
        starts = _open_flat(directory / "starts.bin", np.int64)  # (rows + 1,)
    else:
        rows = len(tokens) // config.text.block_size  # the rest is shorter than a block: dropped
        starts = np.arange(rows + 1, dtype=np.int64) * config.text.block_size  # (rows + 1,)
    gap_before = _open_flat(directory / "gaps.bin", bool) if config.masking.whole_word else None
    return PreparedRows(tokens, starts, gap_before)


def _open_flat(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    # As a plain array: the class memmap adds overhead to every lookup.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

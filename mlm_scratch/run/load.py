"""What a run reads before anything is built: texts and model, with their versions."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from mlm_scratch.config import BUNDLED, TrainConfig, changed, flat
from mlm_scratch.data.documents import (
    Documents,
    count_shared,
    load_documents,
    load_more_to_evaluate_on,
)
from mlm_scratch.data.rows import PreparedRows, Source, prepare_rows
from mlm_scratch.data.stream import ShardedStream
from mlm_scratch.data.tables import read_words
from mlm_scratch.evaluate import masked_batches
from mlm_scratch.hf.hub import model_commit, model_digest
from mlm_scratch.hf.load import load_tokenizer_and_model
from mlm_scratch.parallel.ranks import Ranks
from mlm_scratch.run.directory import check_same_run
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.files import checksum
from mlm_scratch.util.progress import announced

TEXTS_OF_TOKENIZER = 50_000  # of a stream, to train the bundled model's tokenizer on


class Loaded(NamedTuple):
    """What comes from the disk or the Hub."""

    tokenizer: PreTrainedTokenizerBase
    hf_model: PreTrainedModel
    documents: Documents
    source: Source
    eval_rows: dict[str, PreparedRows]  # by name; that of the first is ""
    shared_share: float  # of the documents to evaluate on, those that are in the training text, too
    answers: dict[str, tuple[str, ...]]  # sentences that ask for what the text says (documents.py)
    labels: dict[str, str]  # what is read for training and evaluation, with its version
    config: TrainConfig  # with the commits that the Hub had: a resume loads the same


def load(config: TrainConfig, checkpoint: Path | None, ranks: Ranks) -> Loaded:
    """Load tokenizer, model, the rows to train on and to evaluate on; print what is read.

    Raises:
        UserError: something cannot be read, or is not what the run was begun with.
    """
    disable_progress_bar()  # transformers' own bars, of a second each, would break into ours
    if checkpoint is None and config.model.model_commit is None:
        commit = model_commit(config.model.name, config.model.revision)
        config = changed(config, model_commit=commit)
    with announced("looking up the text"):
        documents, first = load_documents(config)
        others = {} if first is None else {"": first, **load_more_to_evaluate_on(config)}
    if not others and (config.evaluation.best or config.evaluation.patience):
        flag = "--best" if config.evaluation.best else "--patience"
        raise UserError(f"{flag} needs an evaluation loss: pass --eval-file or --eval-fraction")
    words = (
        read_words(config.model.add_tokens) if config.model.add_tokens and not checkpoint else []
    )
    # Only the bundled model's tokenizer is trained on them. A stream is too long for that.
    texts = islice(documents, TEXTS_OF_TOKENIZER) if config.text.streaming else documents
    with announced("loading tokenizer and model"):
        tokenizer, hf_model = load_tokenizer_and_model(config, texts, words, checkpoint)
    source: Source
    if config.text.streaming:
        source = ShardedStream(documents, tokenizer, config, ranks)
    else:
        source = prepare_rows(documents, tokenizer, config)
    eval_rows = {name: prepare_rows(other, tokenizer, config) for name, other in others.items()}
    if checkpoint is None:  # an earlier version began runs without this check
        check_some_are_masked(config, tokenizer, others, eval_rows)
    in_both = {}
    if not config.text.streaming:
        in_both = {name: count_shared(documents, other) for name, other in others.items()}
    print(f"text: {what_was_read(config, documents, source, others, in_both)}")
    labels = {
        f"evaluation, {name}" if name else "evaluation": other.label
        for name, other in others.items()
    }
    return Loaded(
        tokenizer,
        hf_model,
        documents,
        source,
        eval_rows,
        max((shared / len(others[name]) for name, shared in in_both.items()), default=0.0),
        {} if first is None else first.answers,
        {"training": documents.label, **labels},
        with_versions(config, documents, source, eval_rows, checkpoint),
    )


def check_some_are_masked(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    others: dict[str, Documents],
    eval_rows: dict[str, PreparedRows],
) -> None:
    """Raise UserError for a text to evaluate on of which no token is masked: its loss is NaN."""
    for name, rows in eval_rows.items():
        if not any(len(batch.positions) for batch in masked_batches(tokenizer, rows, config)):
            raise UserError(
                f"{others[name].source}: none of the {len(rows.tokens):,} tokens to evaluate on is "
                "masked: use more text, or a higher --eval-mlm-probability"
            )


def what_was_read(
    config: TrainConfig,
    documents: Documents,
    source: Source,
    others: dict[str, Documents],
    in_both: dict[str, int],
) -> str:
    """Describe the text to train on, and the others, to evaluate on, by name."""
    size = config.text.block_size
    if isinstance(source, PreparedRows):
        text = (
            f"{len(documents):,} documents of {documents.label}, {len(source.tokens):,} tokens in "
            f"{len(source):,} rows of up to {size}"
        )
    else:
        text = f"a stream of {documents.label} in {documents.rows.num_shards} files, rows of {size}"
    for name, other in others.items():
        where = "held out" if other.held_out else f"to evaluate on: {other.label}"
        text += f", {len(other):,} {where}"
        if shared := in_both.get(name, 0):
            text += f", {shared:,} of them also in the training text"
    return text


def with_versions(
    config: TrainConfig,
    documents: Documents,
    source: Source,
    eval_rows: dict[str, PreparedRows],
    checkpoint: Path | None,
) -> TrainConfig:
    """Add the versions of all that was read to the settings: a resume has to read the same.

    Raises:
        UserError: it does not; or nothing of it has the revision that was asked for.
    """
    config = changed(config, dataset_commit=documents.commit)
    digests = {"text_digest": source.text_digest, "eval_digest": _digest_of_all(eval_rows)}
    model = config.model
    if (checkpoint is None or model.model_digest is None) and model.name != BUNDLED:
        digests["model_digest"] = model_digest(model.name)
    if model.add_tokens and (checkpoint is None or model.words_digest is None):
        digests["words_digest"] = checksum(Path(model.add_tokens))
    begun = flat(config)
    check_same_run({name: begun[name] for name in digests if begun[name] is not None}, digests)
    if model.revision and not (model.model_commit or config.text.dataset_commit):
        raise UserError("--revision: neither the model nor the data set is from the Hub")
    return changed(config, **digests)


def _digest_of_all(eval_rows: dict[str, PreparedRows]) -> str | None:
    """Digest the texts to evaluate on, with the names of those after the first; None: no text."""
    named = [(name, rows.text_digest) for name, rows in eval_rows.items()]
    if len(named) < 2:
        return named[0][1] if named else None
    return hashlib.sha256(json.dumps([named[0][1], *named[1:]]).encode()).hexdigest()

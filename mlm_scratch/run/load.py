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
    config: TrainConfig  # with the versions of all of it: a resume has to read the same


def load(config: TrainConfig, checkpoint: Path | None, ranks: Ranks) -> Loaded:
    """Load tokenizer, model, the rows to train on and to evaluate on; print what is read.

    Raises:
        UserError: something cannot be read, does not fit the settings, or is not what the run was
            begun with.
    """
    disable_progress_bar()  # transformers' own bars, of a second each, would break into ours
    if checkpoint is None and config.model.model_commit is None:
        commit = model_commit(config.model.name, config.model.revision)
        config = changed(config, model_commit=commit)
    with announced("looking up the text"):
        documents, first = load_documents(config)
        others = {} if first is None else {"": first, **load_more_to_evaluate_on(config)}
    config = changed(config, dataset_commit=documents.commit)
    if config.model.revision and not (config.model.model_commit or documents.commit):
        raise UserError("--revision: neither the model nor the data set is from the Hub")
    add_tokens = config.model.add_tokens
    words = read_words(add_tokens) if add_tokens and checkpoint is None else []
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
    if (flag := config.evaluation.needs_loss) and not any(
        len(batch.positions) for batch in masked_batches(tokenizer, eval_rows[""], config)
    ):
        raise UserError(
            f"{flag} needs an evaluation loss, but no token of {others[''].source} is masked: "
            "use more text, or a higher --eval-mlm-probability"
        )
    in_both = {}
    if not config.text.streaming:
        in_both = {name: count_shared(documents, other) for name, other in others.items()}
    print(f"text: {what_was_read(config, documents, source, others, in_both)}")
    labels = {
        f"evaluation, {name}" if name else "evaluation": other.label
        for name, other in others.items()
    }
    shares = (shared / len(others[name]) for name, shared in in_both.items())
    return Loaded(
        tokenizer=tokenizer,
        hf_model=hf_model,
        documents=documents,
        source=source,
        eval_rows=eval_rows,
        shared_share=max(shares, default=0.0),
        answers={} if first is None else first.answers,
        labels={"training": documents.label, **labels},
        config=with_digests(config, source, eval_rows, checkpoint),
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


def with_digests(
    config: TrainConfig,
    source: Source,
    eval_rows: dict[str, PreparedRows],
    checkpoint: Path | None,
) -> TrainConfig:
    """Add the digests of all that was read to the settings.

    Raises:
        UserError: a run that is resumed was begun with something else.
    """
    digests = {"text_digest": source.text_digest, "eval_digest": _digest_of_all(eval_rows)}
    model = config.model
    if (checkpoint is None or model.model_digest is None) and model.name != BUNDLED:
        digests["model_digest"] = model_digest(model.name)
    if model.add_tokens and (checkpoint is None or model.words_digest is None):
        digests["words_digest"] = checksum(Path(model.add_tokens))
    begun = flat(config)
    check_same_run({name: begun[name] for name in digests if begun[name] is not None}, digests)
    return changed(config, **digests)


def _digest_of_all(eval_rows: dict[str, PreparedRows]) -> str | None:
    """Digest the texts to evaluate on, with the names of those after the first; None: no text."""
    named = [(name, rows.text_digest) for name, rows in eval_rows.items()]
    if len(named) < 2:
        return named[0][1] if named else None
    return hashlib.sha256(json.dumps([named[0][1], *named[1:]]).encode()).hexdigest()

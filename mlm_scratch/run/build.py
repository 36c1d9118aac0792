"""What is built before the first step: text, model, optimizer, schedule, and the run in memory."""

import hashlib
import json
import math
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from mlm_scratch.config import BUNDLED, ModelSettings, TrainConfig, changed, flat
from mlm_scratch.data.documents import (
    Documents,
    count_shared,
    load_documents,
    load_more_to_evaluate_on,
)
from mlm_scratch.data.rows import PreparedRows, Source, prepare_rows
from mlm_scratch.data.stream import ShardedStream
from mlm_scratch.data.tables import read_words
from mlm_scratch.hf.checks import unused_parameters
from mlm_scratch.hf.hub import model_commit, model_digest
from mlm_scratch.hf.load import load_tokenizer_and_model
from mlm_scratch.loader import Collator, Loader
from mlm_scratch.optim import build_optimizer, build_schedule
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.parallel.shares import rows_per_step, share_among
from mlm_scratch.precision import choose_precision
from mlm_scratch.report.watch import read_answerable, read_watched
from mlm_scratch.run.checkpoint import load_state
from mlm_scratch.run.directory import check_same_run
from mlm_scratch.run.losses import LossMeter
from mlm_scratch.run.mistakes import mistakes
from mlm_scratch.run.saver import Saver
from mlm_scratch.run.state import Training, rate_schedule
from mlm_scratch.speed.allocator import keep_freed_memory
from mlm_scratch.speed.bf16_on_cpu import precision_on_cpu
from mlm_scratch.speed.checks import earliest_gather, first_position_if_packed, ready_mask_works
from mlm_scratch.speed.graph import StepGraph, steps_are_alike
from mlm_scratch.speed.model import FastMaskedLM
from mlm_scratch.speed.packing import Layout
from mlm_scratch.speed.padded_vocabulary import PaddedVocabulary, pad_vocabulary
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.files import checksum
from mlm_scratch.util.progress import announced, old_objects_apart

TEXTS_OF_TOKENIZER = 50_000  # of a stream, to train the bundled model's tokenizer on


def prepare(config: TrainConfig, checkpoint: Path | None = None, ranks: Ranks = ALONE) -> Training:
    """Load text and model, and build all that the loop needs; continue from `checkpoint` if given.

    Raises:
        UserError: something cannot be loaded, or does not fit together.
    """
    machine, evaluation = config.machine, config.evaluation
    precision = choose_precision(machine.device, machine.precision)
    with ranks.rank0_first(), old_objects_apart():
        loaded = load(config, checkpoint, ranks)
    tokenizer, hf_model, source = loaded.tokenizer, loaded.hf_model, loaded.source
    if not loaded.eval_rows and (evaluation.best or evaluation.patience):
        flag = "--best" if evaluation.best else "--patience"
        raise UserError(f"{flag} needs an evaluation loss: pass --eval-file or --eval-fraction")
    watched = read_watched(evaluation.watch, hf_model, tokenizer)
    if precision.device.type == "cpu":
        keep_freed_memory()
    config = loaded.config
    with announced("finding out what the model can do"):
        model = adapt(hf_model, config, ranks)
    why = ""
    if machine.precision == "auto" and precision.device.type == "cpu":
        chosen, reason = ranks.rank0_decides(lambda: precision_on_cpu(model))
        config, why = changed(config, precision=chosen), f" ({reason})"  # a resume keeps to it
        precision = choose_precision(machine.device, chosen)
    print(
        f"model: {type(hf_model).__name__} ({_origin(config.model)}), "
        f"{hf_model.num_parameters():,} parameters, on {precision}{why}, "
        f"{what_was_found(model, config, resumed=checkpoint is not None)}"
    )
    on_gpu = precision.device.type == "cuda"
    vocabulary = pad_vocabulary(model) if on_gpu else PaddedVocabulary(hf_model.config.vocab_size)
    model.to(precision.device)
    alike = steps_are_alike(config, precision, ranks)
    layout, eval_layout = layouts(config, model, on_gpu, alike)
    loader = loader_of(config, source, tokenizer, precision.device, layout, ranks)
    optimization = config.optimization
    total_steps = optimization.max_steps or math.ceil(optimization.epochs * loader.steps_per_epoch)
    if ranks.is_first:
        share, epoch = loaded.shared_share, loader.steps_per_epoch
        for line in mistakes(config, source, loaded.documents, share, total_steps, epoch):
            print(f"warning: {line}", file=sys.stderr)
    optimizer = build_optimizer(hf_model, optimization.lr, optimization.weight_decay)
    t = Training(
        config,
        precision,
        ranks,
        tokenizer,
        hf_model,
        model,
        ddp_model=model,
        loader=loader,
        documents=loaded.documents,
        source=source,
        eval_rows=loaded.eval_rows,
        eval_layout=eval_layout,
        total_steps=total_steps,
        optimizer=optimizer,
        scheduler=build_schedule(optimizer, rate_schedule(optimization, total_steps)),
        scaler=precision.grad_scaler(),
        losses=LossMeter(precision, config.output.log_every, ranks),
        vocabulary=vocabulary,
        saver=Saver(in_background=precision.device.type != "cpu"),
        labels=loaded.labels,
        watched=watched,
        answers={
            group: read_answerable(texts, hf_model, tokenizer)
            for group, texts in loaded.answers.items()
        },
    )
    torch.manual_seed(config.optimization.seed + ranks.rank)  # dropout is drawn from here on
    if checkpoint is not None:
        t.load_state_dict(load_state(checkpoint))
    source.start()  # may fork workers: unsafe once NCCL is there, which begins with DDP
    if machine.compile:
        # Blocks have one shape, or two, each compiled separately; else shapes are dynamic.
        model.compile(dynamic=config.text.grouping == "lines")
    if alike and not machine.no_graph:
        t.compute = StepGraph()
    t.ddp_model = ranks.wrap(model, precision.device)
    return t


def loader_of(
    config: TrainConfig,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    layout: Layout,
    ranks: Ranks,
) -> Loader:
    """Build the loader of the rows to train on."""
    optimization = config.optimization
    return source.loader(
        Collator(tokenizer, **config.masking.of_collator(), seed=optimization.seed),
        rows_per_step=rows_per_step(optimization, ranks),
        batch_size=optimization.batch_size,
        seed=optimization.seed,
        device=device,
        share=share_among(ranks, complete=source.complete),
        arrange=layout,
    )


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
    """Load tokenizer, model, the rows to train on and to evaluate on; print what is read."""
    disable_progress_bar()  # transformers' own bars, of a second each, would break into ours
    if checkpoint is None and config.model.model_commit is None:
        commit = model_commit(config.model.name, config.model.revision)
        config = changed(config, model_commit=commit)
    with announced("looking up the text"):
        documents, first = load_documents(config)
        others = {} if first is None else {"": first, **load_more_to_evaluate_on(config)}
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
    in_both = {}
    if not config.text.streaming:
        in_both = {name: count_shared(documents, other) for name, other in others.items()}
    print(f"text: {what_was_read(config, documents, source, others, in_both)}")
    labels = {
        "evaluation" + f", {name}" * bool(name): other.label for name, other in others.items()
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


def _origin(model: ModelSettings) -> str:
    commit = f" at {model.model_commit[:12]}" if model.model_commit else ""
    return f"{model.name}{commit}, {model.init}"


def adapt(hf_model: PreTrainedModel, config: TrainConfig, ranks: Ranks) -> FastMaskedLM:
    """Wrap a model, still on the CPU, and find out by small batches what it can do.

    Raises:
        UserError: --gradient-checkpointing with a model that does not support it.
    """
    model, machine, length = FastMaskedLM(hf_model), config.machine, config.text.block_size
    module = None if machine.dense_head else earliest_gather(model, length)
    model.dense_head = module is None
    # With checkpointing at the encoder's end: a layer that the backward pass computes again would
    # find no positions.
    if module is not None and not machine.gradient_checkpointing:
        model.gather_after(module)
    if config.text.grouping == "lines":  # else no row is padded
        first = None if machine.no_packing else first_position_if_packed(model, length)
        model.packs, model.first_position = first is not None, first or 0
        model.ready_mask = model.packs or ready_mask_works(model, length)
    if ranks.size > 1:  # DDP would wait for their gradients
        for parameter in unused_parameters(model):
            parameter.requires_grad_(False)
    if machine.gradient_checkpointing:
        try:
            hf_model.activation_checkpointing_enable()
        except ValueError as error:
            raise UserError(f"--gradient-checkpointing: {error}") from error
        hf_model.config.use_cache = False  # or decoders in disguise, such as BERT, warn each time
    return model


def layouts(
    config: TrainConfig, model: FastMaskedLM, on_gpu: bool, alike: bool
) -> tuple[Layout, Layout]:
    """Return the layout of the batches to train on, one shape if `alike`, and to evaluate on.

    Also with --no-graph: then it is the same run, with the same dropout.
    """
    of_training = layout = Layout(config.text.block_size, packed=model.packs, aligned=on_gpu)
    if config.machine.compile or alike:
        of_training = replace(layout, mask_rate=max(config.masking.rates))
    if config.machine.compile:
        layout = replace(layout, mask_rate=config.evaluation.eval_mlm_probability)
    if alike and not model.dense_head:  # else the last step's dropout is not Trainer's
        of_training = replace(of_training, rows=config.optimization.batch_size)
    return of_training, layout


def what_was_found(model: FastMaskedLM, config: TrainConfig, resumed: bool) -> str:
    """Describe where the head comes from and runs, and the layout of shorter rows."""
    head, machine = "head on masked positions", config.machine
    if model.dense_head:
        head = "head on all positions" + ("" if machine.dense_head else " (it needs all of them)")
    if config.model.init == "new-head" and not resumed:
        embeddings = model.hf_model.get_input_embeddings().weight
        output = model.hf_model.get_output_embeddings()
        is_tied = output is not None and output.weight is embeddings
        head = f"random {head}, {'' if is_tied else 'not '}tied to the embeddings"
    if config.text.grouping == "blocks":
        return head
    if model.packs:
        return f"{head}, rows packed"
    return f"{head}, rows padded" + ("" if machine.no_packing else " (it mixes packed texts up)")

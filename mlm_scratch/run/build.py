"""What is built before the first step: model, loader, optimizer, schedule, the run in memory."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.config import ModelSettings, TrainConfig, changed
from mlm_scratch.data.rows import Source
from mlm_scratch.hf.checks import unused_parameters
from mlm_scratch.loader import Collator, Loader
from mlm_scratch.optim import build_optimizer, build_schedule
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.parallel.shares import rows_per_step, share_among
from mlm_scratch.precision import choose_precision
from mlm_scratch.report.watch import read_answerable, read_watched
from mlm_scratch.run.checkpoint import load_state
from mlm_scratch.run.load import load
from mlm_scratch.run.losses import LossMeter
from mlm_scratch.run.mistakes import mistakes
from mlm_scratch.run.saver import Saver
from mlm_scratch.run.state import Training, rate_schedule
from mlm_scratch.speed.allocator import keep_freed_memory
from mlm_scratch.speed.bf16_on_cpu import precision_on_cpu
from mlm_scratch.speed.checks import earliest_gather, first_position_if_packed, ready_mask_works
from mlm_scratch.speed.graph import StepGraph, make_capturable, steps_are_alike
from mlm_scratch.speed.model import FastMaskedLM
from mlm_scratch.speed.packing import Layout
from mlm_scratch.speed.padded_vocabulary import PaddedVocabulary, pad_vocabulary
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.progress import announced, old_objects_apart


def prepare(config: TrainConfig, checkpoint: Path | None = None, ranks: Ranks = ALONE) -> Training:
    """Load text and model, and build all that the loop needs; continue from `checkpoint` if given.

    Raises:
        UserError: something cannot be loaded, or does not fit together.
    """
    precision = choose_precision(config.machine.device, config.machine.precision)
    with ranks.rank0_first(), old_objects_apart():
        loaded = load(config, checkpoint, ranks)
    tokenizer, hf_model, source = loaded.tokenizer, loaded.hf_model, loaded.source
    config = loaded.config
    watched = read_watched(config.evaluation.watch, hf_model, tokenizer)
    if precision.device.type == "cpu":
        keep_freed_memory()
    with announced("finding out what the model can do"):
        model = adapt(hf_model, config, ranks)
    why = ""
    if config.machine.precision == "auto" and precision.device.type == "cpu":
        chosen, reason = ranks.rank0_decides(lambda: precision_on_cpu(model))
        config, why = changed(config, precision=chosen), f" ({reason})"  # a resume keeps to it
        precision = choose_precision(config.machine.device, chosen)
    machine, optimization = config.machine, config.optimization
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
    total_steps = optimization.max_steps or math.ceil(optimization.epochs * loader.steps_per_epoch)
    if ranks.is_first:
        for line in mistakes(loaded, total_steps, loader.steps_per_epoch):
            print(f"warning: {line}", file=sys.stderr)
    optimizer = build_optimizer(hf_model, optimization.lr, optimization.weight_decay)
    if on_gpu:
        make_capturable(optimizer, precision.device)
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
    torch.manual_seed(optimization.seed + ranks.rank)  # dropout is drawn from here on
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

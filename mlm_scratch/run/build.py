"""What is built before the first step: text, model, optimizer, schedule, and the run in memory."""

import ctypes
import math
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.documents import load_documents
from mlm_scratch.data.rows import TokenRows, prepare_rows
from mlm_scratch.data.stream import ShardedStream
from mlm_scratch.hf.checks import sparse_head_works, unused_parameters
from mlm_scratch.hf.load import load_tokenizer_and_model
from mlm_scratch.loader import Collator, Loader
from mlm_scratch.model import MaskedLM
from mlm_scratch.optim import build_optimizer, build_schedule
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import Precision, choose_precision
from mlm_scratch.run.checkpoint import load_state
from mlm_scratch.run.metrics import LossMeter
from mlm_scratch.run.state import Training
from mlm_scratch.run.stream_loader import StreamLoader

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers from glibc's malloc.h
TEXTS_OF_TOKENIZER = 50_000  # of a stream, to train the bundled model's tokenizer on


def prepare(config: TrainConfig, checkpoint: Path | None = None, ranks: Ranks = ALONE) -> Training:
    """Load text and model, and build all that the loop needs; continue from `checkpoint` if given.

    Raises:
        UserError: something cannot be loaded, or does not fit together.
    """
    precision = choose_precision(config.device, config.precision)
    with ranks.rank0_first():
        tokenizer, hf_model, rows, eval_rows, sources = load(config, checkpoint, ranks)
    print(
        f"model: {type(hf_model).__name__} ({config.model}, {config.init}), "
        f"{hf_model.num_parameters():,} parameters, on {precision}"
    )
    if precision.device.type == "cpu":
        keep_freed_memory()
    elif precision.dtype == torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32: 10 bits of mantissa, 8 times the speed
    model = MaskedLM(hf_model).to(precision.device)
    if not config.dense_head and not sparse_head_works(model):
        print(
            f"{type(hf_model).__name__}: the head cannot run on masked positions alone; running it "
            "on all of them"
        )
        config = replace(config, dense_head=True)
    collator = Collator(tokenizer, config)
    loader: Loader
    if isinstance(rows, ShardedStream):
        loader = StreamLoader(rows, collator, config, precision.device, ranks)
    else:
        loader = Loader(rows, collator, config, precision.device, ranks)
    total_steps = config.max_steps or math.ceil(config.epochs * loader.steps_per_epoch)
    optimizer = build_optimizer(hf_model, config.lr, config.weight_decay)
    t = Training(
        config,
        precision,
        ranks,
        tokenizer,
        hf_model,
        model,
        ddp_model=wrap_for_training(model, config, precision, ranks),
        loader=loader,
        eval_rows=eval_rows,
        total_steps=total_steps,
        optimizer=optimizer,
        scheduler=build_schedule(optimizer, config.warmup_steps, total_steps),
        scaler=precision.grad_scaler(),
        losses=LossMeter(precision.device, config.log_every, ranks),
        sources=sources,
    )
    torch.manual_seed(config.seed + ranks.rank)  # dropout is drawn from here on
    if checkpoint is not None:
        t.load_state_dict(load_state(checkpoint))
    return t


def load(
    config: TrainConfig, checkpoint: Path | None, ranks: Ranks
) -> tuple[
    PreTrainedTokenizerBase,
    PreTrainedModel,
    TokenRows | ShardedStream,
    TokenRows | None,
    dict[str, str],
]:
    """Load tokenizer, model, the rows to train on and to evaluate on; print and name the text."""
    disable_progress_bar()  # transformers' own bars, of a second each, would break into ours
    documents, eval_documents = load_documents(config)
    # Only the bundled model's tokenizer is trained on them. A stream is too long for that.
    texts = islice(documents, TEXTS_OF_TOKENIZER) if config.streaming else documents
    tokenizer, hf_model = load_tokenizer_and_model(config, texts, checkpoint)
    rows: TokenRows | ShardedStream
    if config.streaming:
        rows = ShardedStream(documents, tokenizer, config, ranks)
        text = (
            f"a stream of {documents.label} in {documents.rows.num_shards} files, rows of "
            f"{config.block_size}"
        )
    else:
        rows = prepare_rows(documents, tokenizer, config)
        text = (
            f"{len(documents):,} documents of {documents.label}, {len(rows.tokens):,} tokens in "
            f"{len(rows):,} rows of up to {config.block_size}"
        )
    eval_rows = prepare_rows(eval_documents, tokenizer, config) if eval_documents else None
    print(f"text: {text}" + (f", {len(eval_rows):,} held out" if eval_rows else ""))
    sources = {"training": documents.label}
    if eval_documents is not None:
        sources["evaluation"] = eval_documents.label
    return tokenizer, hf_model, rows, eval_rows, sources


def wrap_for_training(
    model: MaskedLM, config: TrainConfig, precision: Precision, ranks: Ranks
) -> nn.Module:
    """Compile the model if asked to, and wrap it in DDP if there are several ranks."""
    if ranks.size > 1:  # DDP would wait for their gradients
        for parameter in unused_parameters(model):
            parameter.requires_grad_(False)
    if config.compile:
        # With the same shapes every time the GPU can replay a recorded step (CUDA graphs).
        static = precision.device.type == "cuda" and config.grouping == "blocks"
        model.compile(mode="reduce-overhead" if static and config.accumulate == 1 else "default")
    return ranks.wrap(model)


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next tensor (Linux with glibc; else nothing).

    By default it returns each block over 32 MB to the kernel immediately. Every step then
    needs new pages for the gradient of the embeddings, 154 MB for distilroberta, and the kernel
    clears them first: a quarter of the time of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own
        mallopt(M_TRIM_THRESHOLD, -1)  # nor is the end of the heap returned

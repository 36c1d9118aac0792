"""What is built before the first step: text, model, optimizer, schedule, and the run in memory."""

import ctypes
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.rows import TokenRows, load_documents, prepare_rows
from mlm_scratch.data.stream import StreamLoader
from mlm_scratch.hf.checks import sparse_head_works, unused_parameters
from mlm_scratch.hf.load import load_tokenizer_and_model
from mlm_scratch.loader import Collator, Loader
from mlm_scratch.model import MaskedLM
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import Precision, choose_precision
from mlm_scratch.run.checkpoint import load_state, remove_old, save_checkpoint
from mlm_scratch.run.directory import MAY_CHANGE, SHARED_OUT
from mlm_scratch.util.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of glibc's malloc.h
TEXTS_OF_TOKENIZER = 50_000  # of a stream, to train the bundled model's tokenizer on
LOST_STEPS_IN_A_ROW = 10  # so many steps without a finite loss, and none will have one again


@dataclass
class Training:
    """A run in memory: what its steps read and change."""

    config: TrainConfig
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    net: MaskedLM  # the model, with its head on masked positions only
    parallel_net: nn.Module  # the same, with gradients averaged over the processes
    ranks: Ranks
    loader: Loader | StreamLoader
    eval_rows: TokenRows | None
    total_steps: int
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    # Sums on the device, read once in a while:
    loss_since_log: Tensor  # () the losses of the steps since the last log
    lost_in_a_row: Tensor  # () the steps up to now whose loss was NaN or infinite
    lost_steps: Tensor  # () all such steps of the run
    steps_since_log: int = 0  # those with masked tokens
    steps_done: int = 0
    evaluated_at: int = 0  # steps done at the last evaluation

    def due(self, every: int, step: int | None = None) -> bool:
        """Whether something done every so many steps (0: only at the end) is due at `step`, or
        now."""
        at = self.steps_done if step is None else step
        return at == self.total_steps or (every > 0 and at % every == 0)

    def evaluation_is_due(self) -> bool:
        """Whether the model of this moment is to be evaluated and has not been yet."""
        every = self.config.eval_every or self.loader.steps_per_epoch
        new = self.steps_done > self.evaluated_at
        return self.eval_rows is not None and new and self.due(every)

    def count_step(self, step_loss: Tensor, n_masked: int) -> None:
        """One optimizer step is done. Its loss, this process's part of it, is added to the sums
        without being read."""
        self.ranks.add_up(step_loss)
        self.steps_done += 1
        if n_masked > 0:
            self.steps_since_log += 1
        lost = ~step_loss.isfinite()
        self.loss_since_log += step_loss
        self.lost_steps += lost
        self.lost_in_a_row += lost
        self.lost_in_a_row *= lost

    def take_mean_loss(self) -> float:
        """The mean step loss since the last log (0, as in the reference, if no step had a masked
        token). Here, once in a while, the CPU waits."""
        loss = self.loss_since_log.item() / max(self.steps_since_log, 1)
        self.loss_since_log.zero_()
        self.steps_since_log = 0
        return loss

    def stop_if_lost(self) -> None:
        """Raise UserError if the last LOST_STEPS_IN_A_ROW steps had no finite loss."""
        if (lost := self.lost_in_a_row.item()) >= LOST_STEPS_IN_A_ROW:
            raise UserError(
                f"the loss was NaN or infinite in the last {lost} steps, up to step "
                f"{self.steps_done}; checkpoints from before are kept: begin a new run with a "
                "lower --lr, or with --precision bf16 or fp32 instead of fp16"
            )

    def weights_are_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all(parameter.isfinite().all() for parameter in self.model.parameters())

    def save(self, run_dir: Path) -> None:
        """Write a checkpoint, but never in the place of a good one: NaN weights are not saved."""
        state = self.state_dict()
        if not self.ranks.is_first:
            return
        if not self.weights_are_finite():
            print(
                f"warning: step {self.steps_done}: weights are NaN or infinite: not saved",
                file=sys.stderr,
            )
            return
        save_checkpoint(run_dir, self.steps_done, self.model, self.tokenizer, state)
        self.remove_old_checkpoints(run_dir)

    def remove_old_checkpoints(self, run_dir: Path) -> None:
        """Keep config.keep of them, now that the one of this step is there and valid."""
        scheduled = partial(self.due, self.config.save_every)
        remove_old(run_dir, self.steps_done, self.config.keep, scheduled)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, besides the weights."""
        device = self.precision.device
        on_cuda = device.type == "cuda"
        cuda_rng = self.ranks.gather(torch.cuda.get_rng_state(device)) if on_cuda else None
        return {
            "config": {
                name: value
                for name, value in asdict(self.config).items()
                if name not in MAY_CHANGE | SHARED_OUT
            },
            "rows_per_step": self.loader.rows_per_step,
            "steps_done": self.steps_done,
            "evaluated_at": self.evaluated_at,
            "steps_since_log": self.steps_since_log,
            "loss_since_log": self.loss_since_log,
            "lost_in_a_row": self.lost_in_a_row,
            "lost_steps": self.lost_steps,
            "optimizer": self.optimizer.state_dict(),
            "scheduled_steps": self.scheduler.last_epoch,  # without those not taken
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "text_digests": self.text_digests(),
            "rng": self.ranks.gather(torch.get_rng_state()),  # of each process
            "cuda_rng": cuda_rng,
        }

    def text_digests(self) -> dict[str, str]:
        """What tells the texts of this run from any other."""
        held_out = self.eval_rows.text_digest if self.eval_rows else ""
        return {"training": self.loader.text_digest, "evaluation": held_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the weights come with the model.

        Raises UserError if settings or text are not those that the run was begun with.
        """
        self._check_same_run(state)
        self.steps_done, self.evaluated_at = state["steps_done"], state["evaluated_at"]
        self.steps_since_log = state["steps_since_log"]
        self.loss_since_log.copy_(state["loss_since_log"])
        self.lost_in_a_row.copy_(state["lost_in_a_row"])
        self.lost_steps.copy_(state["lost_steps"])
        self.optimizer.load_state_dict(state["optimizer"])
        # Made anew rather than loaded: where the run was made longer, the rate is another one.
        schedule = self.scheduler.lr_lambdas[0]
        self.scheduler = LambdaLR(self.optimizer, schedule, state["scheduled_steps"] - 1)
        if state["scaler"]:  # empty unless the run was in fp16 until now
            self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        if len(state["rng"]) != self.ranks.size:  # other processes: other dropout, never seen
            torch.manual_seed(self.config.seed + self.steps_done + self.ranks.rank)
            return
        torch.set_rng_state(state["rng"][self.ranks.rank])
        device = self.precision.device
        if state["cuda_rng"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][self.ranks.rank], device)

    def _check_same_run(self, state: dict[str, Any]) -> None:
        if "loader" not in state:
            raise UserError("--resume: the checkpoint was written by another version")
        for name, begun_with in state["config"].items():
            if (now := getattr(self.config, name)) != begun_with:
                raise UserError(
                    f"--resume: this run was begun with {name} {begun_with!r}, not {now!r}; begin "
                    "a new run for that"
                )
        if (rows := self.loader.rows_per_step) != state["rows_per_step"]:
            raise UserError(
                f"--resume: this run was begun with {state['rows_per_step']} rows per step (batch "
                f"size x accumulation x processes), not {rows}; begin a new run for that"
            )
        for which, digest in self.text_digests().items():
            if state["text_digests"][which] != digest:
                raise UserError(f"--resume: the {which} text has changed since; begin a new run")
        if self.total_steps < state["steps_done"]:
            raise UserError(
                f"--resume: the run has {state['steps_done']} steps already, more than the "
                f"{self.total_steps} asked for"
            )


def prepare(config: TrainConfig, checkpoint: Path | None = None, ranks: Ranks = ALONE) -> Training:
    """Load text and model and build all that the loop needs; with a checkpoint, as it was there."""
    precision = choose_precision(config.device, config.precision)
    with ranks.one_after_another():
        tokenizer, model, loader, eval_rows = _load(config, checkpoint, precision.device, ranks)
    print(
        f"model: {type(model).__name__} ({config.model}, {config.init}), "
        f"{model.num_parameters():,} parameters, on {precision}"
    )
    if precision.device.type == "cpu":
        keep_freed_memory()
    elif precision.dtype == torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32: 10 bits of mantissa, 8 times the speed
    net = MaskedLM(model).to(precision.device)
    if not config.dense_head and not sparse_head_works(net):
        print(
            f"{type(model).__name__}: the head cannot run on masked positions alone; running it "
            "on all of them"
        )
        config = replace(config, dense_head=True)
    if ranks.size > 1:  # DistributedDataParallel would wait for their gradients
        for parameter in unused_parameters(net):
            parameter.requires_grad_(False)
    if config.compile:
        # Where all shapes are the same the GPU can replay a recorded step (CUDA graphs).
        static = precision.device.type == "cuda" and config.grouping == "blocks"
        net.compile(mode="reduce-overhead" if static and config.accumulate == 1 else "default")
    parallel_net = ranks.wrap(net)
    total_steps = config.max_steps or math.ceil(config.epochs * loader.steps_per_epoch)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )
    t = Training(
        config,
        precision,
        tokenizer,
        model,
        net,
        parallel_net,
        ranks,
        loader,
        eval_rows,
        total_steps,
        optimizer,
        scheduler=LambdaLR(optimizer, partial(linear_schedule, config.warmup_steps, total_steps)),
        scaler=precision.grad_scaler(),
        loss_since_log=torch.zeros((), device=precision.device),
        lost_in_a_row=torch.zeros((), dtype=torch.int64, device=precision.device),
        lost_steps=torch.zeros((), dtype=torch.int64, device=precision.device),
    )
    torch.manual_seed(config.seed + ranks.rank)  # dropout is drawn from here on
    if checkpoint is not None:
        t.load_state_dict(load_state(checkpoint))
    return t


def _load(
    config: TrainConfig, checkpoint: Path | None, device: torch.device, ranks: Ranks
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, Loader | StreamLoader, TokenRows | None]:
    """Tokenizer, model, the text to train on and the text to evaluate on; says what the text is."""
    disable_progress_bar()  # transformers' own bars, of a second each, would break into ours
    documents, eval_documents = load_documents(config)
    # Only the bundled model reads them. A stream is too long for that.
    texts = islice(documents, TEXTS_OF_TOKENIZER) if config.streaming else documents
    tokenizer, model = load_tokenizer_and_model(config, texts, checkpoint)
    loader: Loader | StreamLoader
    if config.streaming:
        loader = StreamLoader(documents, tokenizer, config, device, ranks)
        text = (
            f"a stream of {documents.source} in {documents.rows.num_shards} files, rows of "
            f"{config.block_size}"
        )
    else:
        rows = prepare_rows(documents, tokenizer, config)
        loader = Loader(rows, Collator(tokenizer, config), config, device, ranks)
        text = (
            f"{len(documents):,} documents of {documents.source}, {len(rows.tokens):,} tokens in "
            f"{len(rows):,} rows of up to {config.block_size}"
        )
    eval_rows = prepare_rows(eval_documents, tokenizer, config) if eval_documents else None
    print(f"text: {text}" + (f", {len(eval_rows):,} held out" if eval_rows else ""))
    return tokenizer, model, loader, eval_rows


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next tensor (Linux with glibc; else nothing).

    By default it hands each block over 32 MB back to the kernel at once. Every step then gets its
    gradient of the embeddings, 154 MB for distilroberta, as new pages that have to be cleared
    first: a quarter of the time of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # no block in a mapping of its own
        mallopt(M_TRIM_THRESHOLD, -1)  # the end of the heap is not given back either


def linear_schedule(warmup_steps: int, total_steps: int, step: int) -> float:
    """The learning rate of a step as a share of the peak: up from 0 over the warm-up, then down to
    0 again.

    Source: get_linear_schedule_with_warmup of transformers.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: weight decay pulls on matrices, never on biases and norms, whose
    size says nothing about how complicated the model is.

    Source: Trainer.get_decay_parameter_names.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    in_norms = {parameter for norm in norms for parameter in norm.parameters()}
    undecayed = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm($|\.)")
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        spared = parameter in in_norms or undecayed.search(name.lower())
        (no_decay if spared else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]

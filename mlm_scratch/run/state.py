"""A run in memory, and everything of it that a checkpoint has to hold."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.config import OptimizationSettings, TrainConfig, as_steps, flat
from mlm_scratch.data.documents import Documents
from mlm_scratch.data.rows import PreparedRows, Source
from mlm_scratch.evaluate import evaluate
from mlm_scratch.hf.checks import weights_are_finite
from mlm_scratch.loader import Loader, TokenRows
from mlm_scratch.loop import compute_step, train_step
from mlm_scratch.model import MaskedLM
from mlm_scratch.optim import build_schedule, share_of_peak
from mlm_scratch.parallel.ranks import Ranks
from mlm_scratch.precision import Precision
from mlm_scratch.report.log import Report
from mlm_scratch.report.metrics import lowest
from mlm_scratch.report.watch import Watched, fill_watched
from mlm_scratch.run.checkpoint import remove_old, save_checkpoint
from mlm_scratch.run.directory import MAY_CHANGE_ON_RESUME, PER_RANK, check_same_run
from mlm_scratch.run.losses import LossMeter
from mlm_scratch.run.saver import Saver
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.speed.packing import Layout
from mlm_scratch.speed.padded_vocabulary import PaddedVocabulary
from mlm_scratch.util.errors import UserError, out_of_memory_means


@dataclass
class Training:
    """A run in memory: what its steps read and change."""

    config: TrainConfig
    precision: Precision
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    hf_model: PreTrainedModel  # as transformers built it; this one is saved
    model: MaskedLM  # the same weights, with the head on masked positions only
    ddp_model: Any  # the same again, with gradients all-reduced if there are several ranks
    loader: Loader
    documents: Documents
    source: Source
    eval_rows: dict[str, PreparedRows]  # of the texts to evaluate on, by name; the first is ""
    eval_layout: Layout
    total_steps: int
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    losses: LossMeter
    vocabulary: PaddedVocabulary
    saver: Saver
    labels: dict[str, str]  # what is read for training and evaluation, with its version
    watched: list[Watched]
    answers: dict[str, list[Watched]]  # what the final model is asked, by group
    compute: Callable[..., tuple[Tensor, Tensor]] = compute_step
    run_dir: Path = Path()
    steps_done: int = 0
    evaluations: dict[int, float] = field(default_factory=dict)  # losses, by the steps done

    def step_arguments(self) -> dict[str, Any]:
        """Return the arguments of `run_steps` other than the steps."""
        return {
            "model": self.ddp_model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "autocast": self.precision.autocast,
            "max_grad_norm": self.config.optimization.max_grad_norm,
            "train_step": partial(train_step, compute=self.compute),
        }

    def due(self, every: int, step: int | None = None) -> bool:
        """Whether something done every `every` steps (0: only at the end) is due.

        At `step`, or now; never before the first step.
        """
        at = self.steps_done if step is None else step
        return at == self.total_steps or (every > 0 and at > 0 and at % every == 0)

    def evaluation_is_due(self) -> bool:
        """Whether the current model has to be evaluated and has not been yet."""
        return self.steps_done not in self.evaluations and self.evaluates_at(self.steps_done)

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after this number of steps."""
        if not (self.eval_rows or self.watched):
            return False
        if step == 0:
            return not self.config.evaluation.no_eval_first
        return self.due(self.evaluation_interval, step)

    @property
    def evaluation_interval(self) -> int:
        """Steps between two evaluations."""
        every = as_steps(self.config.evaluation.eval_every, self.total_steps)
        return every or self.loader.steps_per_epoch

    def evaluate_and_save(self, report: Report, stop: StopRequest) -> bool:
        """Evaluate if due, and save if due. Returns whether the run is to end here.

        That is after a signal, or for lack of patience. An evaluation that a signal cuts short is
        repeated after the resume.
        """
        self.saver.raise_if_failed()
        is_best = self.evaluation_is_due() and self._evaluate(report, stop)
        stopped, exhausted = stop.agreed_by_all_ranks(), self.out_of_patience()
        if stopped or exhausted or is_best or self.due(self.config.output.save_every):
            report.sync()
            self.save()
            # A signal during the save may stop us here: the checkpoint is written, or will be
            # before the run ends.
            stopped = stop.agreed_by_all_ranks()
        return stopped or exhausted

    def _evaluate(self, report: Report, stop: StopRequest) -> bool:
        """Evaluate. Returns whether the model is the best so far and has to be kept."""
        metrics: dict[str, float] = {}
        for name, rows in self.eval_rows.items():
            found = self.evaluate_on(rows, stop.agreed_by_all_ranks)
            if found is None:
                return False
            metrics |= (
                found
                if not name
                else {f"eval_{name}_{value.removeprefix('eval_')}": found[value] for value in found}
            )
        watched = self.watched if self.ranks.is_first else []
        fills = fill_watched(self.hf_model, self.tokenizer, watched)
        report.evaluation(self.steps_done, metrics, fills)
        self.evaluations[self.steps_done] = metrics.get("eval_loss", math.nan)
        return self.config.evaluation.best and self.best_step(self.steps_done) == self.steps_done

    def evaluate_on(
        self, rows: TokenRows, stop: Callable[[], bool] | None = None
    ) -> dict[str, float] | None:
        """Evaluate the model on rows, as `evaluate` does. Raises UserError if out of memory."""
        with out_of_memory_means("evaluate fewer rows at once, with a lower --eval-batch-size"):
            return evaluate(
                self.model,
                self.tokenizer,
                rows,
                self.config,
                self.precision,
                self.ranks,
                stop,
                self.eval_layout,
            )

    def best_step(self, last: int) -> int | None:
        """Return the step with the lowest evaluation loss up to `last`, if any is finite."""
        return lowest({step: loss for step, loss in self.evaluations.items() if step <= last})

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations have not lowered the loss."""
        best = self.best_step(self.steps_done)
        later = [step for step in self.evaluations if step > (-1 if best is None else best)]
        return 0 < self.config.evaluation.patience <= len(later)

    def save(self) -> None:
        """Write a checkpoint, unless weights are NaN or infinite: it would displace a good one."""
        state = self.state_dict()
        if not self.ranks.is_first:
            return
        self.saver.finish()  # before the memory of another copy is taken
        weights, state = self.saver.readable((self.vocabulary.weights(self.hf_model), state))
        if not weights_are_finite(self.hf_model):  # read from the GPU, so the copies are complete
            print(
                f"warning: step {self.steps_done}: weights are NaN or infinite: not saved",
                file=sys.stderr,
            )
            return
        step = self.steps_done

        def write() -> None:
            """Write the checkpoint, and only then remove what it replaces."""
            save_checkpoint(self.run_dir, step, self.hf_model, weights, self.tokenizer, state)
            self.remove_old_checkpoints(step)

        self.saver.write(write)

    def remove_old_checkpoints(self, step: int) -> None:
        """Keep config.output.keep of them up to that of `step`, which must exist and be valid.

        With --best also what was the best at each of them, in case it has to be resumed from.
        """
        scheduled = partial(self.due, self.config.output.save_every)
        best = self.best_step if self.config.evaluation.best else lambda step: None
        remove_old(self.run_dir, step, self.config.output.keep, scheduled, best)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on besides the weights."""
        fixed = flat(self.config).items()
        return {
            "config": {
                name: value for name, value in fixed if name not in MAY_CHANGE_ON_RESUME | PER_RANK
            },
            "rows_per_step": self.loader.rows_per_step,
            "steps_done": self.steps_done,
            "evaluations": dict(self.evaluations),
            **self.losses.state_dict(),
            "optimizer": self.vocabulary.optimizer_state(self.optimizer),
            "scheduled_steps": self.scheduler.last_epoch,  # without skipped steps
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": self.ranks.gather(torch.get_rng_state()),  # of each rank
            **self._device_rng(),
        }

    def _device_rng(self) -> dict[str, Any]:
        states = self.ranks.gather(self.precision.rng_state())  # of each rank
        return {} if states[0] is None else {f"{self.precision.device.type}_rng": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the weights come with the model.

        Raises:
            UserError: settings or texts are not those that the run was begun with.
        """
        check_resume(self, state)
        self.steps_done, self.evaluations = state["steps_done"], dict(state["evaluations"])
        self.losses.load_state_dict(state)
        # The rate's tensor, on a GPU, stays in place; a run may be resumed on another device.
        groups, kept = self.optimizer.param_groups, ("lr", "capturable")
        own = [{name: group[name] for name in kept if name in group} for group in groups]
        self.vocabulary.load_optimizer_state(self.optimizer, state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)
        # Rebuilt rather than loaded: if the run is longer now, its rates are other ones.
        share = rate_schedule(self.config.optimization, self.total_steps)
        self.scheduler = build_schedule(self.optimizer, share, state["scheduled_steps"])
        if state["scaler"]:  # empty unless the run was in fp16 so far
            self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        if len(state["rng"]) != self.ranks.size:  # other ranks: new dropout, drawn nowhere else
            torch.manual_seed(self.config.optimization.seed + self.steps_done + self.ranks.rank)
            return
        torch.set_rng_state(state["rng"][self.ranks.rank])
        device_rng = state.get(f"{self.precision.device.type}_rng")  # None: begun on another kind
        if device_rng is not None:
            self.precision.set_rng_state(device_rng[self.ranks.rank])


def check_resume(t: Training, state: dict[str, Any]) -> None:
    """Raise UserError unless `state` is from an earlier step of the same run."""
    if "evaluations" not in state:
        raise UserError("--resume: the checkpoint was written by another version")
    check_same_run(state["config"], flat(t.config))
    if (rows := t.loader.rows_per_step) != state["rows_per_step"]:
        raise UserError(
            f"--resume: this run was begun with {state['rows_per_step']} rows per step (batch "
            f"size x accumulation x processes), not {rows}; begin a new run for that"
        )
    if t.total_steps < state["steps_done"]:
        raise UserError(
            f"--resume: the run has {state['steps_done']} steps already, more than the "
            f"{t.total_steps} asked for"
        )


def rate_schedule(settings: OptimizationSettings, total_steps: int) -> Callable[[int], float]:
    """Return the schedule of a run: the number of a step -> its share of the peak rate."""
    return partial(
        share_of_peak,
        total_steps=total_steps,
        schedule=settings.schedule,
        warmup_steps=as_steps(settings.warmup_steps, total_steps),
        decay_steps=as_steps(settings.decay_steps, total_steps),
    )

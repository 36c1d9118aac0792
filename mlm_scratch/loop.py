"""The explicit AMP training loop: all that `Trainer` does for masked-language modelling.

    python train.py --epochs 2
    torchrun --nproc-per-node 4 train.py --epochs 2

`run_steps` is the loop; one pass of it is one optimizer step. What is built before the first step
is in run/build.py; the run directory is opened and concluded in run/session.py.
"""

from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from mlm_scratch.config import TrainConfig
from mlm_scratch.evaluate import evaluate
from mlm_scratch.model import masked_lm_loss
from mlm_scratch.parallel.ranks import all_ranks
from mlm_scratch.run.build import LOST_STEPS_IN_A_ROW, Training
from mlm_scratch.run.metrics import NoReport, Report
from mlm_scratch.run.session import open_run
from mlm_scratch.run.signals import StopRequest


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train as `config` says, from the start or from the newest valid checkpoint of a run.

    Returns: the run directory, with the final model in `model/`.

    Raises UserError for what the user can mend; SystemExit(128 + signal) after a stop signal, once
    a checkpoint is written.
    """
    with all_ranks() as ranks, open_run(config, resume, ranks) as run:
        stopped = run_steps(run.training, run.directory, run.report, run.stop)
        run.conclude(stopped)
    return run.directory


def run_steps(t: Training, run_dir: Path, report: Report | NoReport, stop: StopRequest) -> bool:
    """Run the optimizer steps that are left, or up to the first one after a stop signal.

    t: the run in memory. t.net is its model, with the head on masked positions only; t.parallel_net
        is the same for a process that shares the rows of each step with others (t.ranks).

    Returns: whether a signal stopped it before its end.
    """
    config, optimizer, scaler = t.config, t.optimizer, t.scaler

    # After a resume: a signal has cut the evaluation at this step short.
    if t.evaluation_is_due() and evaluate_and_save(t, run_dir, report, stop):
        return True
    for step in t.loader.steps(t.steps_done, t.total_steps):
        # ---- One optimizer step
        learning_rate = float(t.scheduler.get_last_lr()[0])
        step_loss = torch.zeros((), device=t.precision.device)  # () nats per masked token
        for batch in step.batches:
            # Several processes exchange their gradients once per step, in the last backward.
            exchange = t.ranks.exchange_gradients(t.parallel_net, now=batch is step.batches[-1])
            with t.precision.autocast(), exchange:
                loss_sum, _ = masked_lm_loss(
                    t.parallel_net,
                    batch.input_ids,
                    batch.attention_mask,
                    batch.labels,  # (B, T)
                    positions=batch.positions,
                    dense=config.dense_head,  # (N,)
                )
            # Divided by the masked tokens of the whole step, not of this batch: then the gradients
            # add up to those of one large batch, however it was split.
            loss = loss_sum / max(step.n_masked, 1)  # ()
            # Scaled up so that small fp16 gradients do not become 0, and by the number of processes
            # because the exchange leaves the mean of their gradients, and the sum is wanted.
            scaler.scale(loss * t.ranks.size).backward()
            step_loss += loss.detach()

        grad_norm = torch.zeros_like(step_loss)  # ()
        if step.n_masked > 0:  # else all gradients are 0, but AdamW would follow its momentum
            scaler.unscale_(optimizer)  # before measuring: the norm to clip is the true one
            grad_norm = clip_grad_norm_(t.net.parameters(), config.max_grad_norm)  # ()
            scale = scaler.get_scale()  # fp16 makes the CPU wait here; else it is always 1
            scaler.step(optimizer)  # not taken where a gradient overflowed
            scaler.update()  # half the scale after an overflow, twice after 2,000 good steps
            if scaler.get_scale() >= scale:  # a step not taken does not count for the schedule
                t.scheduler.step()
        optimizer.zero_grad()
        t.count_step(step_loss, step.n_masked)
        report.advance(step.n_tokens)

        # ---- Once in a while
        if t.steps_done % config.log_every == 0:
            report.log(t.steps_done, t.take_mean_loss(), learning_rate, grad_norm.item())
        if t.steps_done % min(config.log_every, LOST_STEPS_IN_A_ROW) == 0:
            t.stop_if_lost()  # not at every step: it makes the CPU wait, as a log does
        if evaluate_and_save(t, run_dir, report, stop):
            return True
    return False


def evaluate_and_save(
    t: Training, run_dir: Path, report: Report | NoReport, stop: StopRequest
) -> bool:
    """Evaluate and save, where either is due. Returns whether a signal asks to stop now.

    An evaluation that a signal cuts short is done after the resume.
    """
    if t.eval_rows is not None and t.evaluation_is_due():
        metrics = evaluate(t.net, t.tokenizer, t.eval_rows, t.config, t.precision, t.ranks, stop)
        if metrics is not None:
            report.evaluation(t.steps_done, metrics)
            t.evaluated_at = t.steps_done
    if stop.asked() or t.due(t.config.save_every):
        report.sync()
        t.save(run_dir)
        return stop.asked()  # a signal during the save needs no other step
    return False

"""The explicit AMP training loop: all that `Trainer` does for masked-language modelling.

    python train.py --epochs 2

`run_steps` is the loop; one pass of it is one optimizer step. `train` is the frame around it, from
the settings to a finished run directory; what is built before the first step is in setup.py.
"""

import shutil
import sys
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from mlm_scratch.checkpoint import newest_valid_checkpoint, save_model
from mlm_scratch.errors import UserError
from mlm_scratch.evaluate import evaluate
from mlm_scratch.model import masked_lm_loss
from mlm_scratch.recipes import TrainConfig
from mlm_scratch.report import Report, draw_losses
from mlm_scratch.run_dir import (
    LATEST,
    check_output_dir,
    make_run_dir,
    point_latest_to,
    write_run_json,
)
from mlm_scratch.setup import LOST_STEPS_IN_A_ROW, Training, prepare
from mlm_scratch.signals import StopRequest


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train as `config` says, from the start or from the newest valid checkpoint of a run.

    Returns: the run directory, with the final model in `model/`.

    Raises UserError for what the user can mend; SystemExit(128 + signal) after a stop signal, once
    a checkpoint is written.
    """
    if resume:
        run_dir = Path(config.output_dir or LATEST)
        t = prepare(config, newest_valid_checkpoint(run_dir))
        shutil.rmtree(run_dir / "model", ignore_errors=True)  # it is final no longer
    else:
        check_output_dir(config)
        t = prepare(config)
        run_dir = make_run_dir(config)  # only now that nothing is wrong with text and model
    write_run_json(config, run_dir)
    point_latest_to(run_dir)
    print(f"run: {run_dir}, steps {t.steps_done} to {t.total_steps}", flush=True)
    with (
        StopRequest() as stop,
        Report(run_dir, t.steps_done, t.total_steps, t.loader.steps_per_epoch) as report,
    ):
        run_steps(t, run_dir, report, stop)
    draw_losses(run_dir)
    if stop.received:
        print(f"stopped; go on with: python train.py --resume --output-dir {run_dir}")
        raise SystemExit(128 + stop.received)
    if not t.weights_are_finite():
        raise UserError(
            f"the weights are NaN or infinite after step {t.steps_done}: there is no model to save;"
            " begin a new run with a lower --lr or --weight-decay"
        )
    if lost := t.lost_steps.item():
        print(f"warning: {lost} steps had a NaN or infinite loss", file=sys.stderr)
    save_model(run_dir / "model", t.model, t.tokenizer)
    return run_dir


def run_steps(t: Training, run_dir: Path, report: Report, stop: StopRequest) -> None:
    """Run the optimizer steps that are left, or up to the first one after a stop signal.

    t: the run in memory. t.net is its model, with the head on masked positions only.
    """
    config, net, optimizer, scaler = t.config, t.net, t.optimizer, t.scaler

    for step in t.loader.steps(t.steps_done, t.total_steps):
        # ---- One optimizer step
        learning_rate = t.scheduler.get_last_lr()[0]
        step_loss = torch.zeros((), device=t.precision.device)  # () nats per masked token
        for batch in step.batches:
            with t.precision.autocast():
                loss_sum, _ = masked_lm_loss(
                    net, batch.input_ids, batch.attention_mask, batch.labels,  # (B, T) each
                    positions=batch.positions, dense=config.dense_head,  # (N,)
                )  # fmt: skip
            # Divided by the masked tokens of the whole step, not of this batch: then the gradients
            # add up to those of one large batch, however it was split.
            loss = loss_sum / max(step.n_masked, 1)  # ()
            scaler.scale(loss).backward()  # larger, so that small fp16 gradients do not become 0
            step_loss += loss.detach()

        grad_norm = torch.zeros_like(step_loss)  # ()
        if step.n_masked > 0:  # else all gradients are 0, but AdamW would follow its momentum
            scaler.unscale_(optimizer)  # before measuring: the norm to clip is the true one
            grad_norm = clip_grad_norm_(net.parameters(), config.max_grad_norm)  # ()
            scale = scaler.get_scale()
            scaler.step(optimizer)  # not taken where a gradient overflowed
            scaler.update()  # half the scale after an overflow, twice after 2,000 good steps
            if scaler.get_scale() >= scale:  # a step not taken does not count for the schedule
                t.scheduler.step()
        optimizer.zero_grad()
        t.count_step(step_loss)
        report.advance(step.n_tokens)

        # ---- Once in a while
        if t.steps_done % config.log_every == 0:
            report.log(t.steps_done, t.take_mean_loss(), learning_rate, grad_norm.item())
        if t.steps_done % min(config.log_every, LOST_STEPS_IN_A_ROW) == 0:
            t.stop_if_lost()
        if t.eval_rows is not None and t.due(config.eval_every or t.loader.steps_per_epoch):
            metrics = evaluate(net, t.tokenizer, t.eval_rows, config, t.precision)
            report.evaluation(t.steps_done, metrics)
        if t.due(config.save_every) or stop.received:
            t.save(run_dir)
        if stop.received:
            break

"""Scale, backward, unscale, clip, step, update: the order, tested by its effects.

On the CPU, and with the marker `cuda` the same on a GPU.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from mlm_scratch.config import changed
from mlm_scratch.report.log import FileReport
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run.build import prepare
from mlm_scratch.run.checkpoint import load_state
from mlm_scratch.run.session import train
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.run.steps import run_steps
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.runs import checkpoints, find_fault
from tests.support.tiny import small_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def config(files_without_dropout):
    return small_config(files_without_dropout, log_every=1, weight_decay=0.1, max_grad_norm=0.5)


def steps(t, count, run_dir="run"):
    """Run some steps of a prepared Training; return their metrics."""
    t.run_dir = Path(run_dir)
    t.run_dir.mkdir(exist_ok=True)
    last, total = t.steps_done + count, t.total_steps
    t.total_steps = last
    with FileReport(Path(run_dir), t.steps_done, last, 12) as report:
        run_steps(t, report, StopRequest())
    t.total_steps = total
    return read_metrics(t.run_dir)[-count:]


def with_scale(t, scale):
    """The same Training with another initial loss scale."""
    t.scaler = torch.amp.GradScaler(t.precision.device.type, init_scale=scale)
    return t


def snapshot(t):
    """Copies of the weights and of the state of optimizer and schedule."""
    weights = {name: p.detach().clone() for name, p in t.hf_model.named_parameters()}
    state = {
        (i, key): value.clone()
        for i, slots in t.optimizer.state_dict()["state"].items()
        for key, value in slots.items()
    }
    return weights, state, t.scheduler.state_dict() | {}


def assert_unchanged(before, after):
    for old, new in zip(before[:2], after[:2], strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert before[2] == after[2]


@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_leaves_everything_as_it_was_and_halves_the_scale(config, device):
    t = prepare(changed(config, device=device, precision="fp16"))
    steps(with_scale(t, 2.0**4), 2)  # so that there are moments to keep
    before = snapshot(t)
    with_scale(t, 2.0**40)  # far beyond 65,504, the largest fp16 number
    lines = steps(t, 3)
    assert_unchanged(before, snapshot(t))
    assert t.scaler.get_scale() == 2.0**37
    assert t.steps_done == 5 and t.scheduler.last_epoch == 2
    assert [line["learning_rate"] for line in lines] == [before[2]["_last_lr"][0]] * 3
    assert all(math.isfinite(line["loss"]) for line in lines)  # only the gradients overflow
    with_scale(t, 2.0**4)
    steps(t, 1)
    assert t.scheduler.last_epoch == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision, tolerance", [("fp16", 0.01), ("bf16", 0.05)])
def test_the_norm_is_that_of_the_true_gradients(config, device, precision, tolerance):
    """Clipping comes after unscaling: the norm is that of fp32, whatever the scale."""
    norms = {}
    for scale in (1.0, 2.0**10):
        t = prepare(changed(config, device=device, precision=precision))
        if precision == "fp16":
            with_scale(t, scale)
        norms[scale] = steps(t, 1)[0]["grad_norm"]
    full = steps(prepare(changed(config, device=device, precision="fp32")), 1)[0]
    assert full["grad_norm"] > 1  # so it is clipped, to 0.5
    for norm in norms.values():
        assert norm == pytest.approx(full["grad_norm"], rel=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_what_fp32_learns(config, device, precision):
    full = steps(prepare(changed(config, device=device, precision="fp32")), 24)
    t = prepare(changed(config, device=device, precision=precision))
    assert t.scaler.is_enabled() == (precision == "fp16")  # bf16 has the range of fp32
    half = steps(t, 24)
    assert full[-1]["loss"] < full[0]["loss"] - 0.2
    for one, other in zip(full, half, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=0.05)


def test_weights_are_fp32_and_matrix_products_half_precision(config):
    t = prepare(changed(config, device="cpu", precision="bf16"))
    seen = set()
    query = t.hf_model.roberta.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    steps(t, 1)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in t.hf_model.parameters()} == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
def test_a_resume_restores_the_scaler(config, device, late_writer):
    config = changed(config, device=device, precision="fp16", output_dir="run", save_every=6)
    t = prepare(config)
    with_scale(t, 2.0**40)
    steps(t, 6)
    t.saver.finish()
    assert t.scaler.get_scale() < 2.0**40
    again = prepare(config, Path("run/checkpoint-6"))
    assert again.scheduler.last_epoch == t.scheduler.last_epoch < t.steps_done == 6
    assert again.scheduler.get_last_lr() == t.scheduler.get_last_lr()
    assert again.scaler.state_dict() == t.scaler.state_dict()
    assert load_state(Path("run/checkpoint-6"))["scaler"]["scale"] == t.scaler.get_scale()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_masked_tokens_changes_nothing(config, device, precision):
    t = prepare(changed(config, device=device, precision=precision))
    steps(t, 3)
    before, scaler = snapshot(t), t.scaler.state_dict()
    collator = t.loader.collator
    # --mlm-probability cannot be 0, but a short row may have no masked token.
    collator.mask_rates = (0.0, 0.0)
    (line,) = steps(t, 1)
    assert_unchanged(before, snapshot(t))
    assert t.scaler.state_dict() == scaler
    assert line["loss"] == 0 and line["grad_norm"] == 0 and t.steps_done == 4


def test_a_lost_loss_is_logged_and_ends_the_run_with_the_last_good_checkpoint(config):
    """A rate of 1e36 makes the weights infinite at the first step whose rate is not 0."""
    config = changed(config, lr=1e36, warmup_steps=4, save_every=1, keep=2, output_dir="run")
    with pytest.raises(UserError, match=r"NaN or infinite in the last 10 steps"):
        train(config)
    lines = read_metrics(Path("run"))
    good = [line["step"] for line in lines if math.isfinite(line["loss"])]
    assert good == list(range(1, len(good) + 1))
    assert len(lines) == len(good) + 10
    newest = checkpoints(Path("run"))[0]
    assert newest.name == f"checkpoint-{good[-1]}" and find_fault(newest) is None
    assert not Path("run/model").exists()


@pytest.mark.parametrize(
    "precision, advice",
    [("fp32", "a lower --lr or more --warmup-steps"), ("fp16", "--precision bf16 or fp32")],
)
def test_a_short_run_that_is_lost_from_the_start_ends_with_advice(config, precision, advice):
    """Before 10 steps in a row are lost: nothing else would say so."""
    config = changed(config, lr=1e36, max_steps=4, precision=precision, output_dir="run")
    with pytest.raises(UserError, match=f"the loss was NaN or infinite .*{advice}"):
        train(config)
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert None in losses  # JSON has no NaN
    assert not Path("run/model").exists()


def test_a_lost_run_ends_long_before_its_next_log_line(config):
    config = changed(config, lr=1e36, warmup_steps=2, max_steps=90, log_every=80)
    with pytest.raises(UserError, match=r"in the last 1\d steps, up to step 20;"):
        train(config)


def test_one_non_finite_step_is_counted_and_does_not_end_a_run(config, capsys):
    """In fp16 the scaler skips such a step, so the weights survive."""
    config = changed(config, precision="fp16", device="cpu", output_dir="run")
    t = prepare(config)
    steps(t, 2)
    weight = t.hf_model.lm_head.bias
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    (line,) = steps(t, 1)
    weight.data.copy_(kept)
    assert math.isnan(line["loss"]) and "not saved" in capsys.readouterr().err
    assert math.isfinite(steps(t, 1)[0]["loss"])
    assert t.losses.nonfinite.item() == 1 and t.losses.nonfinite_in_a_row.item() == 0

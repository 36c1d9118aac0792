"""Scale, backward, unscale, clip, step, update: the order, seen by its effects.

On the CPU, and with the marker `cuda` the same tests on a GPU.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlm_scratch.config import resolve
from mlm_scratch.loop import run_steps, train
from mlm_scratch.run.build import prepare
from mlm_scratch.run.checkpoint import checkpoints, find_fault, load_state
from mlm_scratch.run.metrics import Report
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.util.errors import UserError
from tests.support.tiny import SENTENCES, save_roberta

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    torch.manual_seed(1)
    save_roberta(directory / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (directory / "a.txt").write_text("\n".join(f"{i}: {t}" for i in range(8) for t in SENTENCES))
    return directory


@pytest.fixture
def config(files):
    return resolve(
        "tutorial",
        {
            "model": str(files / "model"),
            "train_file": (str(files / "a.txt"),),
            "block_size": 16,
            "lr": 1e-3,
            "log_every": 1,
            "eval_fraction": 0.0,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
        },
    )


def steps(t, count, run_dir="run"):
    """Run some steps of a prepared Training; returns their metrics."""
    Path(run_dir).mkdir(exist_ok=True)
    last, total = t.steps_done + count, t.total_steps
    t.total_steps = last
    with Report(Path(run_dir), t.steps_done, last, 12) as report:
        run_steps(t, Path(run_dir), report, StopRequest())
    t.total_steps = total
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][-count:]


def with_scale(t, scale):
    """The same Training with another first loss scale."""
    t.scaler = torch.amp.GradScaler(t.precision.device.type, init_scale=scale)
    return t


def snapshot(t):
    """Copies of the weights and of everything the optimizer and the schedule hold."""
    weights = {name: p.detach().clone() for name, p in t.model.named_parameters()}
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
    t = prepare(replace(config, device=device, precision="fp16"))
    steps(with_scale(t, 2.0**4), 2)  # two good ones, so that there are moments to keep
    before = snapshot(t)
    with_scale(t, 2.0**40)  # far beyond 65,504, the largest fp16 number
    lines = steps(t, 3)
    assert_unchanged(before, snapshot(t))
    assert t.scaler.get_scale() == 2.0**37
    assert t.steps_done == 5 and t.scheduler.last_epoch == 2
    assert [line["learning_rate"] for line in lines] == [before[2]["_last_lr"][0]] * 3
    assert all(math.isfinite(line["loss"]) for line in lines)  # only the gradients overflowed
    with_scale(t, 2.0**4)
    steps(t, 1)
    assert t.scheduler.last_epoch == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision, tolerance", [("fp16", 0.01), ("bf16", 0.05)])
def test_the_norm_is_that_of_the_true_gradients(config, device, precision, tolerance):
    """Clipping after unscaling: the norm does not know the scale and is that of fp32."""
    norms = {}
    for scale in (1.0, 2.0**10):
        t = prepare(replace(config, device=device, precision=precision))
        if precision == "fp16":
            with_scale(t, scale)
        norms[scale] = steps(t, 1)[0]["grad_norm"]
    full = steps(prepare(replace(config, device=device, precision="fp32")), 1)[0]
    assert full["grad_norm"] > 1  # it really is clipped, at 0.5
    for norm in norms.values():
        assert norm == pytest.approx(full["grad_norm"], rel=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_what_fp32_learns(config, device, precision):
    full = steps(prepare(replace(config, device=device, precision="fp32")), 24)
    half = steps(prepare(replace(config, device=device, precision=precision)), 24)
    assert full[-1]["loss"] < full[0]["loss"] - 0.2
    for one, other in zip(full, half, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=0.05)


def test_weights_stay_fp32_and_products_are_half(config):
    t = prepare(replace(config, device="cpu", precision="bf16"))
    seen = set()
    query = t.model.roberta.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    steps(t, 1)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in t.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
def test_the_state_of_the_scaler_survives_a_resume(config, device):
    config = replace(config, device=device, precision="fp16", output_dir="run", save_every=6)
    t = prepare(config)
    with_scale(t, 2.0**40)
    steps(t, 6)
    assert t.scaler.get_scale() < 2.0**40
    again = prepare(config, Path("run/checkpoint-6"))
    assert again.scaler.state_dict() == t.scaler.state_dict()
    assert load_state(Path("run/checkpoint-6"))["scaler"]["scale"] == t.scaler.get_scale()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_masked_tokens_changes_nothing(config, device, precision):
    t = prepare(replace(config, device=device, precision=precision))
    steps(t, 3)
    before, scaler = snapshot(t), t.scaler.state_dict()
    collator = t.loader.collator
    # No --mlm-probability allows 0, but a short row can happen to have no masked token.
    object.__setattr__(collator.config, "mlm_probability", 0.0)
    (line,) = steps(t, 1)
    assert_unchanged(before, snapshot(t))
    assert t.scaler.state_dict() == scaler
    assert line["loss"] == 0 and line["grad_norm"] == 0 and t.steps_done == 4


def test_a_lost_loss_is_logged_and_ends_the_run_with_the_last_good_checkpoint(config):
    """A learning rate of 1e36 makes the weights infinite at the first step that has one."""
    config = replace(config, lr=1e36, warmup_steps=4, save_every=1, keep=2, output_dir="run")
    with pytest.raises(UserError, match=r"NaN or infinite in the last 10 steps"):
        train(config)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    good = [line["step"] for line in lines if math.isfinite(line["loss"])]
    assert good == list(range(1, len(good) + 1))
    assert len(lines) == len(good) + 10
    newest = checkpoints(Path("run"))[0]
    assert newest.name == f"checkpoint-{good[-1]}" and find_fault(newest) is None
    assert not Path("run/model").exists()


def test_one_lost_step_does_not_end_a_run_but_is_counted(config, capsys):
    """In fp16 the scaler leaves such a step out, so the weights survive."""
    config = replace(config, precision="fp16", device="cpu", output_dir="run")
    t = prepare(config)
    steps(t, 2)
    weight = t.model.lm_head.bias
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    (line,) = steps(t, 1)
    weight.data.copy_(kept)
    assert math.isnan(line["loss"]) and "not saved" in capsys.readouterr().err
    assert math.isfinite(steps(t, 1)[0]["loss"])
    assert t.lost_steps.item() == 1 and t.lost_in_a_row.item() == 0

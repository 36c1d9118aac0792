"""What a checkpoint must hold, each piece by what a resume without it would do."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlm_scratch.config import changed
from mlm_scratch.parallel.ranks import ALONE
from mlm_scratch.precision import Precision
from mlm_scratch.run import build
from mlm_scratch.run.build import prepare
from mlm_scratch.run.checkpoint import load_state
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from tests.support.processes import forget_after
from tests.support.same import assert_same_run
from tests.support.tiny import small_config

CHECKPOINT = Path("run/checkpoint-4")


@pytest.fixture
def config(files):
    config = small_config(files, output_dir="run", max_steps=6, save_every=4, log_every=3)
    train(config)
    return config


def resumed(config, state, rank=0, size=1):
    """A run that goes on from `state`, as one of several ranks sees it."""
    t = prepare(config)
    t.ranks = replace(ALONE, rank=rank, size=size)
    t.load_state_dict(state)
    return t


def test_another_optimizer_can_be_resumed(files, monkeypatch):
    """SGD, whose groups do not have all settings of AdamW's."""

    def sgd(model, lr, weight_decay):
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9)

    monkeypatch.setattr(build, "build_optimizer", sgd)
    config = small_config(files, output_dir="run", max_steps=6, save_every=3, log_every=1)
    whole = train(changed(config, output_dir="whole"))
    forget_after(3, train(config))
    assert_same_run(whole, train(config, resume=True))


def test_each_rank_goes_on_with_its_own_random_state(config, monkeypatch):
    """Of the CPU and of the device."""
    on_device = []
    monkeypatch.setattr(Precision, "set_rng_state", lambda self, state: on_device.append(state))
    state = load_state(CHECKPOINT)
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    for rank in (0, 1):
        resumed(config, state | {"rng": states, "cpu_rng": ["a", "b"]}, rank, size=2)
        assert torch.equal(torch.get_rng_state(), states[rank])
    assert on_device == ["a", "b"]


def test_ranks_that_are_new_draw_different_dropout(config):
    """And another one than the run drew at its start."""
    state, drawn = load_state(CHECKPOINT), []
    for rank in (0, 1, 2):
        resumed(config, state, rank, size=3)
        drawn.append(torch.rand(()).item())
    torch.manual_seed(config.optimization.seed)
    assert len({*drawn, torch.rand(()).item()}) == 4


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_skipped_steps_are_not_scheduled_after_a_resume_either(config, skipped):
    state = load_state(CHECKPOINT)
    assert state["scheduled_steps"] == state["steps_done"] == 4
    t = resumed(config, state | {"scheduled_steps": 4 - skipped})
    assert t.steps_done == 4 and t.scheduler.last_epoch == 4 - skipped
    assert t.scheduler.get_last_lr() == [pytest.approx(1e-3 * (6 - 4 + skipped) / 6)] * 2


@pytest.mark.parametrize("sizes", [{"batch_size": 4}, {"accumulate": 2}])
def test_another_number_of_rows_per_step_is_another_run(config, sizes):
    with pytest.raises(UserError, match="begun with 8 rows per step"):
        train(changed(config, **sizes), resume=True)
    train(changed(config, batch_size=4, accumulate=2), resume=True)


def moments(t):
    return [value for slot in t.optimizer.state.values() for value in slot.values()]


def test_every_piece_of_state_comes_back(config):
    """Each is changed in a copy of the checkpoint; a resume has to have the changed one."""
    t, state = resumed(config, load_state(CHECKPOINT)), load_state(CHECKPOINT)
    assert t.losses.steps == 1 and t.losses.sum > 0  # one step since the last log line
    assert len(moments(t)) > 20
    state["loss_since_log"] += 1
    state["steps_since_log"] += 1
    state["nonfinite"] += 5
    state["nonfinite_in_a_row"] += 2
    state["evaluations"] = {0: 3.0}
    state["loader"]["mask_generator"] = torch.Generator().manual_seed(9).get_state()
    for slot in state["optimizer"]["state"].values():
        for value in slot.values():
            value += 1
    other = resumed(config, state)
    assert other.losses.sum == pytest.approx(t.losses.sum.item() + 1) and other.losses.steps == 2
    assert (other.losses.nonfinite.item(), other.losses.nonfinite_in_a_row.item()) == (5, 2)
    assert other.evaluations == {0: 3.0}
    generator = other.loader.collator.generator.get_state()
    assert torch.equal(generator, state["loader"]["mask_generator"])
    for one, another in zip(moments(t), moments(other), strict=True):
        torch.testing.assert_close(another, one + 1)


def test_a_checkpoint_of_another_version_is_refused(config):
    state = load_state(CHECKPOINT)
    with contextlib.suppress(KeyError):
        del state["evaluations"]
    with pytest.raises(UserError, match="was written by another version"):
        resumed(config, state)


def test_a_run_does_not_end_before_where_it_is(config):
    with pytest.raises(UserError, match="has 6 steps already, more than the 5 asked for"):
        train(changed(config, max_steps=5), resume=True)

"""--best and --patience: the lowest evaluation loss decides what is kept and when to stop.

The losses are written down here, so that the order of good and bad evaluations is known.
"""

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mlm_scratch.model import MaskedLM
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import state
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.runs import checkpoints, find_fault, step_of
from tests.support.same import assert_same
from tests.support.tiny import small_config

EVERY_TWO = {"eval_every": 2, "eval_fraction": 0.2, "max_steps": 12, "save_every": 0}


@pytest.fixture
def losses(monkeypatch):
    """The evaluation loss at each step; may be changed by a test."""
    of_step = {0: 5.0, 2: 4.0, 4: 2.0, 6: 3.0, 8: math.nan, 10: 2.0, 12: 2.5}
    steps_done = {}
    evaluation_is_due = state.Training.evaluation_is_due

    def is_due(self):
        steps_done["now"] = self.steps_done
        return evaluation_is_due(self)

    def evaluate(*_):
        loss = of_step[steps_done["now"]]
        return {"eval_loss": loss, "perplexity": math.exp(loss), "eval_accuracy": 0.5}

    monkeypatch.setattr(state.Training, "evaluation_is_due", is_due)
    monkeypatch.setattr(state, "evaluate", evaluate)
    return of_step


def steps_kept(run_dir=Path("run")):
    return [step_of(path) for path in checkpoints(run_dir)]


def metrics(run_dir):
    return (run_dir / "metrics.jsonl").read_text()


def weights(directory):
    return load_file(directory / "model.safetensors")


def test_the_best_checkpoint_is_kept_and_becomes_the_model(files, losses, capsys):
    """Step 4, the first of two equal ones; a loss that is NaN is none."""
    run_dir = train(small_config(files, output_dir="run", best=True, keep=1, **EVERY_TWO))
    assert steps_kept() == [12, 4]
    assert_same(weights(run_dir / "model"), weights(run_dir / "checkpoint-4"))
    out = capsys.readouterr().out
    assert "model/ is that of checkpoint-4: the lowest evaluation loss, 2.0000" in out
    assert f"perplexity {math.exp(5):.2f} -> {math.exp(2):.2f}\n" in out
    plain = train(small_config(files, output_dir="plain", **EVERY_TWO))
    assert steps_kept(plain) == [12]  # and nothing else differs
    assert_same(weights(plain / "model"), weights(run_dir / "checkpoint-12"))
    assert metrics(plain) == metrics(run_dir)


def test_the_pretrained_model_may_be_the_best(files, losses):
    losses.update(dict.fromkeys(losses, 6.0) | {0: 1.0})
    run_dir = train(small_config(files, output_dir="run", best=True, **EVERY_TWO))
    assert_same(weights(run_dir / "model"), weights(files / "model"))


@pytest.mark.parametrize(
    "killed_before", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (5, 7, 11))]
)
def test_the_best_outlives_kills_and_damage(files, losses, monkeypatch, killed_before, capsys):
    """Resumed from the checkpoint before the newest, which is damaged, if there is one."""
    settings = EVERY_TWO | {"save_every": 3}
    whole = train(small_config(files, output_dir="whole", best=True, **settings))
    forward, calls = MaskedLM.forward, []

    def killed(*args):
        calls.append(1)
        if len(calls) == killed_before:
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MaskedLM, "forward", killed)
        train(small_config(files, output_dir="run", best=True, **settings))
    so_far = [line for line in read_metrics(Path("run")) if "eval_loss" in line]
    best = min(so_far, key=lambda line: (line["eval_loss"], line["step"]))["step"]
    assert find_fault(Path(f"run/checkpoint-{best}")) is None  # it is kept, not made again
    newest = checkpoints(Path("run"))[0]
    (newest / "model.safetensors").write_bytes(b"damaged")
    run_dir = train(resumed_config("run", {}), resume=True)
    assert steps_kept() == steps_kept(whole)
    assert_same(weights(run_dir / "model"), weights(whole / "model"))
    assert metrics(run_dir) == metrics(whole)


def test_a_best_checkpoint_that_is_damaged_gives_way_to_the_next_best(files, losses, capsys):
    train(small_config(files, output_dir="run", best=True, keep=3, **EVERY_TWO))
    capsys.readouterr()
    shutil.rmtree("run/model")
    (Path("run/checkpoint-4") / "model.safetensors").write_bytes(b"damaged")
    run_dir = train(resumed_config("run", {}), resume=True)
    assert "checkpoint-4, the best, is damaged" in capsys.readouterr().err
    assert_same(weights(run_dir / "model"), weights(run_dir / "checkpoint-12"))


def test_patience_ends_a_run_that_no_longer_gets_better(files, losses, capsys):
    settings = EVERY_TWO | {"patience": 2, "output_dir": "run"}
    run_dir = train(small_config(files, **settings))
    assert [line["step"] for line in read_metrics(run_dir) if "eval_loss" in line] == [
        0,
        2,
        4,
        6,
        8,
    ]
    assert steps_kept() == [8]
    line = "step 8 of 12 was the last: no lower evaluation loss in 2 evaluations"
    assert line in capsys.readouterr().out
    model = weights(run_dir / "model")
    train(resumed_config("run", {}), resume=True)  # it has ended: nothing moves
    assert_same(weights(run_dir / "model"), model)
    assert steps_kept() == [8]
    losses[10] = 1.0
    train(resumed_config("run", {"patience": 3}), resume=True)
    assert steps_kept()[0] == 12


@pytest.mark.parametrize(
    "flag, settings, advice",
    [
        ("--best", {"best": True}, "--eval-file or --eval-fraction"),
        ("--patience", {"patience": 1}, "--eval-file or --eval-fraction"),
        ("--best", {"best": True, "streaming": True, "max_steps": 3}, "--eval-file"),
    ],
)
def test_without_a_text_to_evaluate_on_nothing_can_be_the_best(files, flag, settings, advice):
    watch = ("Water <mask>.",)  # evaluations there are, but without a loss
    with pytest.raises(UserError, match=f"{flag} needs an evaluation loss, .* add {advice}$"):
        small_config(files, watch=watch, **settings)


def test_no_finite_loss_is_no_best(files, losses, capsys):
    losses.update(dict.fromkeys(losses, math.nan))
    run_dir = train(small_config(files, output_dir="run", best=True, patience=3, **EVERY_TWO))
    assert steps_kept() == [4]  # 0, 2 and 4 were the three
    assert_same(weights(run_dir / "model"), weights(run_dir / "checkpoint-4"))

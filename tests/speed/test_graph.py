"""Steps replayed as a CUDA graph: the same run. Without a GPU: tests/test_gpu_stand_in.py."""

from dataclasses import replace

import pytest
import torch

from mlm_scratch.config import TUTORIAL, changed
from mlm_scratch.loader import batch_of
from mlm_scratch.loop import run_steps
from mlm_scratch.masking import IGNORE
from mlm_scratch.parallel.ranks import ALONE, Ranks
from mlm_scratch.precision import Precision
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import session
from mlm_scratch.run.build import prepare
from mlm_scratch.run.session import train
from mlm_scratch.speed.graph import steps_are_alike
from mlm_scratch.speed.packing import Layout
from mlm_scratch.speed.shapes import pad_positions
from tests.support.same import assert_same_run
from tests.support.tiny import small_config

# Two epochs with dropout, their last steps short; checkpoints and evaluations on the way.
RUN = {"epochs": 2, "log_every": 1, "save_every": 7, "keep": 9, "eval_fraction": 0.2}


@pytest.fixture
def graphs(monkeypatch):
    """Whether each run that was prepared has captured a graph."""
    runs, make = [], session.prepare

    def noted(*arguments):
        runs.append(make(*arguments))
        return runs[-1]

    monkeypatch.setattr(session, "prepare", noted)
    return lambda: [getattr(t.compute, "graph", None) is not None for t in runs]


@pytest.mark.cuda
@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "bf16", "accumulate": 2, "batch_size": 4},
        {"precision": "bf16", "dense_head": True},
        {"precision": "bf16", "whole_word": True},
        {"precision": "bf16", "batch_size": 1, "mlm_probability": 0.05},  # steps without masks
    ],
    ids=["fp32", "bf16", "fp16", "accumulated", "dense head", "whole words", "nothing masked"],
)
def test_a_replayed_run_is_the_same_run(files, graphs, settings):
    settings = {**RUN, **settings, "device": "cuda"}
    plain = train(small_config(files, **settings, no_graph=True))
    replayed = train(small_config(files, **settings))
    assert graphs() == [False, True]
    assert_same_run(plain, replayed)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_runs_with_and_without_a_graph_resume_into_each_other(files, graphs, precision):
    settings = {**RUN, "device": "cuda", "precision": precision, "schedule": "constant"}
    whole = train(small_config(files, **settings))
    for no_graph in (True, False):
        config = small_config(files, **settings, no_graph=no_graph, output_dir=f"run {no_graph}")
        train(changed(config, epochs=1))
        resumed = train(changed(config, no_graph=not no_graph), resume=True)
        assert_same_run(whole, resumed)
    assert graphs() == [True, False, True, True, False]


@pytest.mark.cuda
@pytest.mark.slow
def test_a_compiled_step_is_captured(files_without_dropout, graphs):
    settings = {**RUN, "device": "cuda", "precision": "fp32", "max_steps": 8}
    plain = read_metrics(train(small_config(files_without_dropout, **settings, no_graph=True)))
    torch.compiler.reset()
    replayed = read_metrics(train(small_config(files_without_dropout, **settings, compile=True)))
    assert graphs() == [False, True]
    for one, other in zip(plain, replayed, strict=True):
        assert other == pytest.approx(one, rel=1e-3)


@pytest.mark.cuda
def test_a_model_that_makes_the_cpu_wait_is_not_captured(files, capfd):
    """A capture that fails leaves no trace in what follows: weights, gradients, dropout."""

    def waiting(module, inputs, output):
        output.sum().item()

    losses = []
    for no_graph in (True, False):
        config = small_config(files, device="cuda", precision="bf16", no_graph=no_graph)
        t = prepare(config)
        t.hf_model.lm_head.register_forward_hook(waiting)
        done = run_steps(t.loader.steps(0, 9), **t.step_arguments())
        losses.append([step.loss.item() for step in done])
    assert losses[0] == losses[1]
    warning = "warning: steps are not replayed as a CUDA graph: CUDA error: operation not permitted"
    assert capfd.readouterr().err.count(warning) == 1


def test_which_runs_have_steps_of_one_shape():
    gpu, cpu = (Precision(torch.device(name), torch.float32) for name in ("cuda", "cpu"))
    assert steps_are_alike(TUTORIAL, gpu, ALONE)
    assert steps_are_alike(changed(TUTORIAL, accumulate=2), gpu, ALONE)
    assert not steps_are_alike(TUTORIAL, cpu, ALONE)
    assert not steps_are_alike(TUTORIAL, gpu, Ranks(size=2))
    for settings in ({"grouping": "lines"}, {"gradient_checkpointing": True}):
        assert not steps_are_alike(changed(TUTORIAL, **settings), gpu, ALONE)


def test_a_short_batch_is_filled_up_with_rows_without_labels():
    ids = torch.arange(12).view(3, 4)  # (B, T)
    labels = torch.full_like(ids, IGNORE)
    labels[0, 1] = labels[2, 3] = 7
    batch = batch_of(ids, None, labels)
    layout = Layout(limit=4, rows=5)
    filled = layout(batch)
    assert filled.input_ids.shape == filled.labels.shape == (5, 4)
    assert filled.input_ids[:3].equal(ids) and filled.labels[:3].equal(labels)
    assert (filled.labels[3:] == IGNORE).all()
    assert filled.positions.tolist() == [1, 11]
    assert len(replace(layout, rows=0)(batch).labels) == 3
    fixed = replace(layout, mask_rate=0.15)(batch)
    assert fixed.positions[:2].tolist() == [1, 11]
    assert len(fixed.positions) == len(pad_positions(torch.zeros(5 * 4, dtype=torch.bool), 0.15))

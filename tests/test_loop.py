"""The loop: accumulation, empty steps, no waiting for the GPU, compiled models."""

import shutil
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention as attention

from mlm_scratch.loop import train_step
from mlm_scratch.report.log import FileReport
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import state
from mlm_scratch.run.build import prepare
from mlm_scratch.run.directory import make_run_dir
from mlm_scratch.run.session import train
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.run.steps import run_steps
from tests.support.same import assert_same
from tests.support.tiny import NO_DROPOUT, save_roberta, small_config


@pytest.mark.parametrize("batch_size, accumulate", [(16, 2), (8, 4), (4, 8)])
def test_accumulation_changes_nothing_but_memory(files_without_dropout, batch_size, accumulate):
    """32 x 1 as 16 x 2, 8 x 4, 4 x 8: equal loss and gradient at every step, also at the short
    last one of an epoch. The rows differ in length, so the batches differ in masked tokens. No
    dropout, whose masks depend on the shapes; no learning, which would add up rounding errors.
    """
    settings = {"log_every": 1, "lr": 1e-20, "max_grad_norm": 1e9, "grouping": "lines"}
    whole = lines_and_gradients(small_config(files_without_dropout, **settings, batch_size=32))
    parts = lines_and_gradients(
        small_config(
            files_without_dropout, **settings, batch_size=batch_size, accumulate=accumulate
        )
    )
    assert len(whole) == len(parts) == 4
    for (one, gradient), (many, summed) in zip(whole, parts, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
        assert (summed - gradient).norm() < 1e-6 * gradient.norm()


def lines_and_gradients(settings):
    """The metrics of each step of a run, and the gradient that the optimizer was given."""
    t = prepare(settings)
    gradients = []
    t.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            torch.cat([p.grad.flatten() for p in t.hf_model.parameters() if p.grad is not None])
        )
    )
    t.run_dir = make_run_dir(settings)
    with FileReport(t.run_dir, 0, t.total_steps, t.loader.steps_per_epoch) as report:
        run_steps(t, report, StopRequest())
    return list(zip(read_metrics(t.run_dir), gradients, strict=True))


def test_empty_steps_change_nothing_and_do_not_count_in_the_mean(files):
    """On a gradient of 0, AdamW would still apply momentum and weight decay."""
    settings = {"weight_decay": 0.1, "batch_size": 1, "log_every": 1, "save_every": 1, "keep": 100}
    run_dir = train(small_config(files, mlm_probability=0.03, max_steps=40, **settings))
    lines = read_metrics(run_dir)
    empty = [line["step"] for line in lines if line["loss"] == 0 and line["step"] > 5]
    assert len(empty) > 5
    for step in empty:
        before, after = (run_dir / f"checkpoint-{s}" for s in (step - 1, step))
        assert_same(*(load_file(path / "model.safetensors") for path in (before, after)))
        old, new = (torch.load(path / "training_state.pt") for path in (before, after))
        assert_same(old["optimizer"], new["optimizer"])
        assert old["scheduled_steps"] == new["scheduled_steps"]
    settings |= {"log_every": 20, "save_every": 0}
    means = read_metrics(train(small_config(files, mlm_probability=0.03, max_steps=40, **settings)))
    for mean, part in zip(means, (lines[:20], lines[20:]), strict=True):
        losses = [line["loss"] for line in part if line["loss"] > 0]
        assert mean["loss"] == pytest.approx(sum(losses) / len(losses))


@pytest.mark.cuda
@pytest.mark.parametrize("grouping", ["blocks", "lines"])
@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        "bf16",
        pytest.param(
            "fp16",
            marks=pytest.mark.xfail(
                strict=True,
                raises=RuntimeError,
                reason="the schedule has to know whether the step was skipped",
            ),
        ),
    ],
)
def test_a_step_never_waits_for_the_gpu(files, precision, grouping):
    """From the end of step 2 to that of step 9, between two logs, every synchronization of the
    CPU with the GPU is an error."""
    settings = {"grouping": grouping, "block_size": 64, "max_steps": 12, "log_every": 100}
    t = prepare(small_config(files, device="cuda", precision=precision, **settings))

    class Switch:
        steps = 0

        def advance(self, step):
            self.steps += 1
            if self.steps in (2, 9):
                torch.cuda.set_sync_debug_mode("error" if self.steps == 2 else "default")

        def sync(self):
            pass

    t.run_dir = make_run_dir(t.config)
    try:
        run_steps(t, Switch(), StopRequest())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert t.steps_done == 12


# Two epochs, their last steps short: the shapes of the batches, and so the graphs.
COMPILED = {
    "blocks": ({}, 2),
    "blocks, accumulated": ({"accumulate": 2}, 2),
    "blocks, dense head": ({"dense_head": True}, 2),
    "blocks, checkpointed": ({"gradient_checkpointing": True}, 2),
    "blocks of whole words": ({"whole_word": True}, 2),
    "padded": ({"grouping": "lines", "block_size": 64}, 1),
    "padded, accumulated": ({"grouping": "lines", "block_size": 64, "accumulate": 2}, 1),
}


@pytest.mark.parametrize(
    "settings, graphs",
    [
        pytest.param(*case, id=name, marks=[] if name == "blocks" else pytest.mark.slow)
        for name, case in COMPILED.items()
    ],
)
def test_a_compiled_step_is_one_graph_per_shape(
    files_without_dropout, monkeypatch, settings, graphs
):
    """Counted by a backend that compiles nothing, and that a graph break would be an error for."""
    compiled_at, steps_begun, compile_module = [], [], torch.nn.Module.compile

    def backend(graph, inputs):
        compiled_at.append(len(steps_begun))
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        nodes = chain(*(part.graph.nodes for part in parts))
        attentions = [node for node in nodes if node.target == attention]
        # A mask of ones would rule out the fast kernels of a GPU.
        assert attentions and all(
            (node.kwargs["attn_mask"] is None) == ("grouping" not in settings)
            for node in attentions
        )
        return graph.forward

    def counted_step(*arguments, **options):
        steps_begun.append(1)
        return train_step(*arguments, **options)

    def counting(module, dynamic):
        compile_module(module, dynamic=dynamic, backend=backend, fullgraph=True)

    settings = {"log_every": 1, "eval_fraction": 0.2, **settings}
    plain = read_metrics(train(small_config(files_without_dropout, **settings)))
    torch.compiler.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", counting)
    monkeypatch.setattr(state, "train_step", counted_step)
    run_dir = train(small_config(files_without_dropout, **settings, compile=True))
    for one, other in zip(plain, read_metrics(run_dir), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert len(compiled_at) == graphs
    first_epoch = len(steps_begun) // 2
    assert all(0 < step <= first_epoch for step in compiled_at)  # the second has nothing new


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2}, {"grouping": "lines", "block_size": 64}],
    ids=["blocks", "accumulated", "padded"],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_compiled_model_learns_the_same(files, tmp_path, device, settings):
    """The compiled code reads the positions of each batch, not those of the first one."""
    if device == "cpu" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++")
    torch.compiler.reset()
    one_layer = save_roberta(tmp_path / "model", num_hidden_layers=1, **NO_DROPOUT)
    settings = {**settings, "model": str(one_layer), "max_steps": 4, "log_every": 1}
    settings = {**settings, "device": device, "precision": "fp32"}
    plain = read_metrics(train(small_config(files, **settings)))
    compiled = read_metrics(train(small_config(files, **settings, compile=True)))
    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)

"""Whole small runs: they learn, and what they leave behind is complete."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
)

import infer
from mlm_scratch.loop import run_steps, train
from mlm_scratch.run.build import prepare
from mlm_scratch.run.checkpoint import checkpoints
from mlm_scratch.run.directory import make_run_dir
from mlm_scratch.run.metrics import Report
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.util.errors import UserError
from tests.support.same import assert_same, assert_same_run
from tests.support.tiny import byte_level_tokenizer, save_roberta, small_config


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(directory):
    return load_file(directory / "model.safetensors")


def test_a_run_learns_and_leaves_everything_behind(files, capsys):
    run_dir = train(small_config(files, epochs=10, lr=3e-3, eval_fraction=0.2, save_every=30))
    assert run_dir == Path("runs/tutorial") and Path("runs/latest").resolve() == run_dir.resolve()
    lines = metrics(run_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 1.5
    assert len(evaluations) == 10  # one per epoch
    assert set(evaluations[0]) == {"step", "epoch", "eval_loss", "perplexity", "eval_accuracy"}
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 1

    total = evaluations[-1]["step"]
    assert [path.name for path in checkpoints(run_dir)] == [
        f"checkpoint-{total}",
        f"checkpoint-{total - total % 30}",
    ]
    for directory in (run_dir / "model", *checkpoints(run_dir)):
        AutoTokenizer.from_pretrained(directory)
        _, info = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    saved = weights(run_dir / "model")
    assert all(
        torch.equal(saved[name], model_weight)
        for name, model_weight in weights(run_dir / f"checkpoint-{total}").items()
    )
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    curves = EventAccumulator(str(run_dir / "logs")).Reload()
    assert set(curves.Tags()["scalars"]) == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "eval/loss",
        "eval/perplexity",
        "eval/accuracy",
    }
    assert [event.value for event in curves.Scalars("train/loss")] == pytest.approx(losses)
    notes = json.loads((run_dir / "run.json").read_text())
    assert notes["config"]["epochs"] == 10 and notes["versions"]["torch"] == torch.__version__
    assert "RobertaForMaskedLM" in capsys.readouterr().out


def test_equal_runs_have_equal_files_and_never_share_a_directory(files):
    first, second = train(small_config(files)), train(small_config(files))
    assert (first.name, second.name) == ("tutorial", "tutorial-2")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("batch_size, accumulate", [(16, 2), (8, 4), (4, 8)])
def test_accumulation_changes_nothing_but_memory(files, batch_size, accumulate):
    """32 x 1 as 16 x 2, 8 x 4, 4 x 8: the same loss and gradient at every step, the short one at
    the end of an epoch too. Rows of unequal length, so batches have unequally many masked tokens.
    No dropout, whose masks depend on the shapes; no learning, which would add up rounding errors.
    """
    no_dropout = files / "no-dropout"
    save_roberta(no_dropout, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = {
        "model": str(no_dropout),
        "log_every": 1,
        "lr": 1e-20,
        "max_grad_norm": 1e9,
        "grouping": "lines",
    }
    whole = lines_and_gradients(small_config(files, **settings, batch_size=32))
    parts = lines_and_gradients(
        small_config(files, **settings, batch_size=batch_size, accumulate=accumulate)
    )
    assert len(whole) == len(parts) == 4
    for (one, gradient), (many, summed) in zip(whole, parts, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
        assert (summed - gradient).norm() < 1e-6 * gradient.norm()


def lines_and_gradients(settings):
    """The metrics of each step of a run, and the gradient it handed to the optimizer."""
    t = prepare(settings)
    gradients = []
    t.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None])
        )
    )
    run_dir = make_run_dir(settings)
    with Report(run_dir, 0, t.total_steps, t.loader.steps_per_epoch) as report:
        run_steps(t, run_dir, report, StopRequest())
    return list(zip(metrics(run_dir), gradients, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_is_the_run_that_never_stopped(files, precision):
    """From the middle of the first epoch, with evaluation, accumulation, and the scaler."""
    settings = small_config(
        files,
        precision=precision,
        accumulate=2,
        batch_size=4,
        save_every=4,
        keep=100,
        eval_fraction=0.2,
        eval_every=5,
        log_every=3,
        output_dir="whole",
    )
    whole = train(settings)
    shutil.copytree(whole, "stopped")
    for directory in [Path("stopped/model"), *checkpoints(Path("stopped"))[:-1]]:
        shutil.rmtree(directory)
    assert [path.name for path in checkpoints(Path("stopped"))] == ["checkpoint-4"]
    resumed = train(replace(settings, output_dir="stopped"), resume=True)
    assert_same_run(whole, resumed)


def test_a_run_without_a_checkpoint_is_resumed_from_its_beginning(files):
    whole = train(small_config(files, output_dir="whole"))
    shutil.copytree(whole, "stopped", ignore=shutil.ignore_patterns("checkpoint-*", "model"))
    resumed = train(small_config(files, output_dir="stopped"), resume=True)
    assert (resumed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_a_resumed_run_may_change_its_length_log_interval_and_precision(files):
    """The schedule of the longer run holds from the next step on; the loss is a mean over the
    steps since the last log, however many they are."""
    settings = small_config(files, output_dir="run", max_steps=4, log_every=10)
    train(settings)
    longer = replace(settings, max_steps=8, log_every=5, precision="fp16")
    train(longer, resume=True)
    (line,) = metrics(Path("run"))
    assert line["step"] == 5 and line["learning_rate"] == pytest.approx(1e-3 * (8 - 4) / 8)
    assert 5 < line["loss"] < 6.5
    assert checkpoints(Path("run"))[0].name == "checkpoint-8"
    with pytest.raises(UserError, match="has 8 steps already, more than the 6 asked for"):
        train(replace(settings, max_steps=6), resume=True)


def test_a_run_that_goes_on_has_no_final_model_yet(files, monkeypatch):
    settings = small_config(files, output_dir="run", max_steps=4, save_every=5)
    train(settings)
    assert Path("run/model").is_dir()

    def stop(*args):
        raise SystemExit(143)

    monkeypatch.setattr("mlm_scratch.loop.run_steps", stop)
    with pytest.raises(SystemExit):
        train(replace(settings, max_steps=8), resume=True)
    assert not Path("run/model").exists()
    assert infer.newest_model().name == "checkpoint-4"


def test_a_model_that_the_sparse_head_does_not_know_runs_dense_and_says_so(
    files, monkeypatch, capsys
):
    dense = metrics(train(small_config(files, dense_head=True)))
    assert "head" not in capsys.readouterr().out
    monkeypatch.setattr("mlm_scratch.run.build.sparse_head_works", lambda net: False)
    assert metrics(train(small_config(files))) == dense
    lines = [line for line in capsys.readouterr().out.splitlines() if "head" in line]
    assert len(lines) == 1 and "running it on all of them" in lines[0]


def test_an_encoder_decoder_is_refused(files):
    """BART is among AutoModelForMaskedLM, but its loss is not that of masked tokens."""
    directory = files / "bart"
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(directory)
    BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
        )
    ).save_pretrained(directory)
    with pytest.raises(UserError, match="has a decoder"):
        train(small_config(files, model=str(directory)))
    assert not Path("runs").exists()


def test_runs_that_start_at_once_get_directories_of_their_own(files):
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(make_run_dir, [small_config(files)] * 20))
    assert len(set(made)) == 20


@pytest.mark.parametrize(
    "settings",
    [
        {"whole_word": True},
        {"grouping": "lines"},
        {"init": "scratch"},
        {"dense_head": True},
        {"max_steps": 5},
        {"epochs": 0.5},
        {"mlm_probability": 0.001},
    ],
    ids=str,
)
def test_every_way_of_training_runs_and_stays_finite(files, settings):
    run_dir = train(small_config(files, log_every=1, **settings))
    losses = [line["loss"] for line in metrics(run_dir)]
    assert all(0 <= loss < 10 for loss in losses)
    assert len(losses) == (5 if "max_steps" in settings else len(losses)) > 3


def test_a_step_without_masked_tokens_changes_nothing(files):
    """With momentum and weight decay, AdamW would move on a gradient of 0 as well."""
    settings = {"weight_decay": 0.1, "batch_size": 1, "log_every": 1, "save_every": 1, "keep": 100}
    run_dir = train(small_config(files, mlm_probability=0.03, max_steps=40, **settings))
    lines = metrics(run_dir)
    empty = [line["step"] for line in lines if line["loss"] == 0 and line["step"] > 5]
    assert len(empty) > 5
    for step in empty:
        before, after = (run_dir / f"checkpoint-{s}" for s in (step - 1, step))
        for name, weight in weights(before).items():
            assert torch.equal(weights(after)[name], weight)
        old, new = (torch.load(path / "training_state.pt") for path in (before, after))
        assert_same(old["optimizer"], new["optimizer"])
        assert old["scheduled_steps"] == new["scheduled_steps"]
    # Nor do they pull down the mean of the others.
    settings |= {"log_every": 20, "save_every": 0}
    means = metrics(train(small_config(files, mlm_probability=0.03, max_steps=40, **settings)))
    for mean, part in zip(means, (lines[:20], lines[20:]), strict=True):
        losses = [line["loss"] for line in part if line["loss"] > 0]
        assert mean["loss"] == pytest.approx(sum(losses) / len(losses))


@pytest.mark.cuda
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
                reason="the schedule asks whether the step was taken",
            ),
        ),
    ],
)
def test_a_step_never_waits_for_the_gpu(files, precision):
    """From the end of step 2 to that of step 9, in between two looks at the loss, every wait of
    the CPU for the GPU is an error."""
    t = prepare(
        small_config(files, device="cuda", precision=precision, max_steps=12, log_every=100)
    )

    class Switch:
        steps = 0

        def advance(self, n_tokens):
            self.steps += 1
            if self.steps in (2, 9):
                torch.cuda.set_sync_debug_mode("error" if self.steps == 2 else "default")

        def sync(self):
            pass

    run_dir = make_run_dir(t.config)
    try:
        run_steps(t, run_dir, Switch(), StopRequest())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert t.steps_done == 12


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_compiled_model_learns_the_same(files, device):
    """The compiled code reads the positions of each batch, not those of the first one."""
    if device == "cpu" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++")
    one_layer = files / "one-layer"
    save_roberta(
        one_layer, num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    settings = {"model": str(one_layer), "max_steps": 4, "log_every": 1, "device": device}
    plain = metrics(train(small_config(files, **settings)))
    compiled = metrics(train(small_config(files, **settings, compile=True)))
    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)

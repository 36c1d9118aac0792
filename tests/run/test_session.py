"""Whole small runs: they learn, leave everything behind, resume exactly, and refuse what cannot
work."""

import errno
import json
import os
import re
import shutil
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
from mlm_scratch.config import changed
from mlm_scratch.hf import load as hf_load
from mlm_scratch.hf.hub import newest_model
from mlm_scratch.precision import Precision
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import build, state
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.runs import checkpoints
from tests.support.same import assert_same, assert_same_run
from tests.support.tiny import byte_level_tokenizer, small_config


def test_a_run_learns_and_leaves_everything_behind(files, capsys):
    run_dir = train(small_config(files, epochs=10, lr=3e-3, eval_fraction=0.2, save_every=30))
    assert run_dir == Path("runs/tutorial") and Path("runs/latest").resolve() == run_dir.resolve()
    lines = read_metrics(run_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 1.5
    assert len(evaluations) == 11  # before the first step, and one per epoch
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
    assert_same(
        load_file(run_dir / "model/model.safetensors"),
        load_file(run_dir / f"checkpoint-{total}/model.safetensors"),
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
    versions = {source.split(" (version ")[1] for source in notes["sources"].values()}
    assert notes["sources"].keys() == {"training", "evaluation"} and len(versions) == 1
    assert (
        notes["config"]["optimization"]["epochs"] == 10
        and notes["versions"]["torch"] == torch.__version__
    )
    out = capsys.readouterr().out
    assert "RobertaForMaskedLM" in out
    first, last = evaluations[0]["perplexity"], evaluations[-1]["perplexity"]
    assert re.search(
        rf"^{total} steps in 00:\d\d, [\d,]+ tokens/s .*; perplexity {first:.2f} -> {last:.2f}$",
        out,
        re.MULTILINE,
    )


def test_a_resume_keeps_the_precision_that_was_chosen(files, monkeypatch, capsys):
    monkeypatch.setattr(build, "precision_on_cpu", lambda model: ("bf16", "it gains"))
    run_dir = train(small_config(files, precision="auto", max_steps=3))
    assert "on CPU, bf16 (it gains), head" in capsys.readouterr().out
    monkeypatch.setattr(build, "precision_on_cpu", lambda model: ("fp32", "it does not"))
    train(resumed_config(run_dir, {"max_steps": 6}), resume=True)
    assert "on CPU, bf16, head" in capsys.readouterr().out
    train(resumed_config(run_dir, {"max_steps": 9, "precision": "auto"}), resume=True)
    assert "on CPU, fp32 (it does not), head" in capsys.readouterr().out
    assert (
        json.loads((run_dir / "run.json").read_text())["config"]["machine"]["precision"] == "fp32"
    )


def test_equal_runs_have_equal_files_and_never_share_a_directory(files):
    first, second = train(small_config(files)), train(small_config(files))
    assert (first.name, second.name) == ("tutorial", "tutorial-2")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


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
    losses = [line["loss"] for line in read_metrics(run_dir)]
    assert all(0 <= loss < 10 for loss in losses)
    # Two epochs are 24 steps, of 6 if each row is a document.
    steps = {"max_steps": 5, "epochs": 6, "grouping": 12}
    assert len(losses) == next((steps[name] for name in settings if name in steps), 24)


# ---- Resume --------------------------------------------------------------------------------------


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
    resumed = train(changed(settings, output_dir="stopped"), resume=True)
    assert_same_run(whole, resumed)


def test_a_run_without_a_checkpoint_resumes_from_its_beginning(files):
    whole = train(small_config(files, output_dir="whole"))
    shutil.copytree(whole, "stopped", ignore=shutil.ignore_patterns("checkpoint-*", "model"))
    resumed = train(small_config(files, output_dir="stopped"), resume=True)
    assert (resumed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_a_resumed_run_may_change_its_length_log_interval_and_precision(files):
    """The schedule is that of the longer run from the next step on; the loss is the mean over the
    steps since the last log, however many they are."""
    settings = small_config(files, output_dir="run", max_steps=4, log_every=10)
    train(settings)
    longer = changed(settings, max_steps=8, log_every=5, precision="fp16")
    train(longer, resume=True)
    (line,) = read_metrics(Path("run"))
    assert line["step"] == 5 and line["learning_rate"] == pytest.approx(1e-3 * (8 - 4) / 8)
    assert 5 < line["loss"] < 6.5
    assert checkpoints(Path("run"))[0].name == "checkpoint-8"
    with pytest.raises(UserError, match="has 8 steps already, more than the 6 asked for"):
        train(changed(settings, max_steps=6), resume=True)


def test_a_resumed_run_has_no_final_model_until_its_end(files, monkeypatch):
    settings = small_config(files, output_dir="run", max_steps=4, save_every=5)
    train(settings)
    assert Path("run/model").is_dir()

    def stop(*args):
        raise SystemExit(143)

    monkeypatch.setattr("mlm_scratch.run.session.run_steps", stop)
    with pytest.raises(SystemExit):
        train(changed(settings, max_steps=8), resume=True)
    assert not Path("run/model").exists()
    assert newest_model().name == "checkpoint-4"


def test_a_checkpoint_that_its_run_removes_while_it_is_loaded(files, monkeypatch, call):
    """As a run does that goes on: the next one is there first."""
    train(small_config(files, max_steps=4, save_every=4))
    shutil.rmtree("runs/latest/model")

    load = hf_load.load_tokenizer

    def load_tokenizer(name):
        if name.name == "checkpoint-4":
            shutil.copytree(name, name.with_name("checkpoint-8"))
            shutil.rmtree(name)
        return load(name)

    monkeypatch.setattr(hf_load, "load_tokenizer", load_tokenizer)
    code, out, err = call(infer, "A <mask> galaxy.")
    assert code == 0 and "using checkpoint-8" in err and "galaxy" in out


@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_a_run_does_not_resume_on_another_text(files, tmp_path, which):
    """Of the same length, and with the same modification time."""
    texts = {"training": tmp_path / "a.txt", "evaluation": tmp_path / "b.txt"}
    for text in texts.values():
        shutil.copy(files / "a.txt", text)
    settings = changed(
        small_config(files, output_dir="run", train_file=(str(texts["training"]),), max_steps=4),
        eval_file=(str(texts["evaluation"]),),
    )
    train(settings)
    before = texts[which].stat()
    texts[which].write_text(texts[which].read_text().replace("0:", "9:"))
    os.utime(texts[which], ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=f"the {which} text has changed"):
        train(changed(settings, max_steps=5), resume=True)


@pytest.mark.parametrize("name, value", [("mlm_probability", 0.3), ("lr", 1.0), ("seed", 5)])
def test_an_edited_run_json_does_not_change_the_run(files, name, value):
    settings = small_config(files, output_dir="run", max_steps=4)
    train(settings)
    with pytest.raises(UserError, match=f"begun with {name}"):
        train(changed(settings, **{name: value, "max_steps": 5}), resume=True)


# ---- What cannot work ----------------------------------------------------------------------------


def test_a_model_without_a_sparse_head_runs_dense_and_says_so(files, monkeypatch, capsys):
    dense = read_metrics(train(small_config(files, dense_head=True)))
    assert "head on all positions\n" in capsys.readouterr().out
    monkeypatch.setattr(build, "earliest_gather", lambda model, length: None)
    assert read_metrics(train(small_config(files))) == dense
    assert "head on all positions (it needs all of them)" in capsys.readouterr().out


def test_an_encoder_decoder_is_refused(files, tmp_path):
    """BART is an AutoModelForMaskedLM, but its loss is not that of masked tokens."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path)
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
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has a decoder"):
        train(small_config(files, model=str(tmp_path)))
    assert not Path("runs").exists()


def test_a_resume_restores_the_random_state_of_the_device(files, monkeypatch):
    restored = []
    monkeypatch.setattr(Precision, "rng_state", lambda self: torch.tensor([7]))
    monkeypatch.setattr(Precision, "set_rng_state", lambda self, state: restored.append(state))
    settings = small_config(files, output_dir="run", max_steps=4, save_every=2)
    train(settings)
    train(changed(settings, max_steps=6), resume=True)
    assert [state.tolist() for state in restored] == [[7]]


def test_a_resume_may_find_that_the_model_can_do_something_else(
    files_without_dropout, monkeypatch, capsys
):
    """What is found out by trying is no setting: another machine or version may find otherwise."""
    settings = {"max_steps": 10, "save_every": 5, "log_every": 1, "lr": 1e-6}
    settings = small_config(files_without_dropout, **settings)
    whole = train(changed(settings, output_dir="whole"))
    run_dir = train(changed(settings, output_dir="run", max_steps=5))
    monkeypatch.setattr(build, "earliest_gather", lambda model, length: None)
    train(changed(settings, output_dir="run"), resume=True)
    assert "head on all positions (it needs all of them)" in capsys.readouterr().out
    for one, other in zip(read_metrics(whole), read_metrics(run_dir), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert not json.loads((run_dir / "run.json").read_text())["config"]["machine"]["dense_head"]


@pytest.mark.parametrize("trouble", ["vanished", "read-only"])
def test_an_output_directory_that_goes_away_is_reported_in_one_line(files, monkeypatch, trouble):
    settings = small_config(files, output_dir="run", save_every=5, max_steps=15)
    save = state.save_checkpoint

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def troubled(run_dir, step, *args):
        if step == 10 and trouble == "vanished":
            shutil.rmtree(run_dir)
        elif step == 10:
            monkeypatch.setattr(os, "mkdir", refuse)
        return save(run_dir, step, *args)

    monkeypatch.setattr(state, "save_checkpoint", troubled)
    reason = "No such file or directory" if trouble == "vanished" else "Read-only file system"
    with pytest.raises(UserError, match=f"cannot write to run: {reason}"):
        train(settings)
    assert Path("run").exists() == (trouble == "read-only")

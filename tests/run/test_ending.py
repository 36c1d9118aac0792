"""What a finished run leaves behind: a model card that says how, and results.json."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train as command
from mlm_scratch.config import resolve
from mlm_scratch.hf.load import load_model
from mlm_scratch.report.card import MAX_ROWS, command_line, model_card, without_directories
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import ending
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.run.session import train
from tests.support.same import assert_same
from tests.support.tiny import small_config, small_flags

SETTINGS = {
    "watch": ("Paris is the [capital] of France.",),
    "eval_fraction": 0.2,
    "eval_every": 4,
    "max_steps": 8,
    "warmup_steps": 0.25,
    "mlm_probability": "0.3:0.15",
    "whole_word": True,
}


@pytest.fixture
def home(files, tmp_path):
    """The model and the text in directories whose names are nobody's business."""
    directory = tmp_path / "home" / "jane doe"
    shutil.copytree(files, directory)
    return directory


def test_the_card_tells_all_and_nobodys_name(home, call, monkeypatch):
    run_dir = train(small_config(home, **SETTINGS)).resolve()
    card = ModelCard.load(run_dir / "model/README.md")
    assert card.data.pipeline_tag == "fill-mask" and card.data.base_model is None
    for private in ("jane", "home", str(home)):
        assert private not in card.content
    first, *_, last = [line for line in read_metrics(run_dir) if "eval_loss" in line]
    outcome = (
        f"evaluation text: {first['perplexity']:.2f} after 0 steps, {last['perplexity']:.2f} after "
    )
    assert outcome + "8." in card.content and "a.txt (version " in card.content
    assert f"| 8 | {last['epoch']:.2f} | {last['eval_loss']:.4f} |" in card.content
    assert (run_dir / "model/loss.png").read_bytes() == (run_dir / "loss.png").read_bytes()

    (line,) = [line for line in card.content.splitlines() if line.startswith("python train.py")]
    monkeypatch.chdir(home)  # where the files are, the command gives the same model
    code, _, err = call(command, *shlex.split(line)[2:], "--output-dir", "again")
    assert code == 0, err
    assert_same(
        load_file(run_dir / "model/model.safetensors"), load_file("again/model/model.safetensors")
    )


@pytest.mark.parametrize(
    "recipe, given, expected",
    [
        ("tutorial", {}, ""),
        ("bundled", {"seed": 1}, " --seed 1"),
        ("tutorial", {"dataset": "a/b"}, " --dataset a/b"),
        ("bundled", {"seed": 0, "eval_every": 0, "lr": 1.0}, " --lr 1.0 --seed 0 --eval-every 0"),
        ("tutorial", {"model": "bundled", "init": "scratch"}, " --model bundled"),
        (
            "tutorial",
            {"dataset": "a/b", "eval_fraction": 0.2},
            " --dataset a/b --eval-fraction 0.2",
        ),
        ("bundled", {"train_file": ("/x/y z.txt",)}, " --train-file 'y z.txt'"),
        ("bundled", {"model": "a/b", "compile": True}, " --model a/b --compile"),
        (
            "tutorial",
            {"train_file": ("a.txt",), "streaming": True, "max_steps": 5},
            " --train-file a.txt --streaming --max-steps 5",
        ),
    ],
)
def test_the_command_line_says_what_is_not_implied(recipe, given, expected):
    config, _ = without_directories(resolve(recipe, given))
    assert command_line(config) == f"python train.py --recipe {recipe}{expected}"


@pytest.mark.parametrize("part", ["draw_losses", "model_card", "report_page"])
def test_the_model_is_there_whatever_fails_after_it(files, monkeypatch, part):
    def failing(*_):
        raise ValueError("no")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no"):
        patch.setattr(ending, part, failing)
        train(small_config(files, max_steps=2, output_dir="run"))
    load_model(Path("run/model"))
    train(resumed_config("run", {}), resume=True)  # makes up for it
    assert Path("run/report.html").is_file() and Path("run/model/README.md").is_file()


@pytest.mark.parametrize("name", ["./bundled", "."])
def test_any_directory_may_hold_the_model(files, call, monkeypatch, tmp_path, name):
    """Also one called as the built-in model is, or a path that is part of any other."""
    shutil.copytree(files / "model", tmp_path / "bundled")
    monkeypatch.chdir(tmp_path if name == "./bundled" else tmp_path / name / "bundled")
    flags = [*small_flags(files)[2:], "--max-steps", 1, "--output-dir", tmp_path / "run of $x"]
    code, out, err = call(command, "--model", name, *flags)
    assert code == 0, err
    assert f"hf upload 'YOUR_NAME/run of $x' '{tmp_path}/run of $x/model'" in out
    card = (tmp_path / "run of $x/model/README.md").read_text()
    assert "- training: a.txt (version " in card and "--model ./bundled" in card


@pytest.mark.slow
def test_a_directory_called_bundled_is_not_the_built_in_model(files, call, monkeypatch, tmp_path):
    """Nor the built-in text: not even where a run of that name is."""
    shutil.copytree(files / "model", tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    flags = ["--max-steps", 1, "--device", "cpu", "--precision", "fp32"]
    code, out, err = call(command, "--model", "bundled", *small_flags(files)[2:], "--max-steps", 1)
    assert code == 0 and "model: ModernBertForMaskedLM (bundled, scratch)" in out, err
    text = ["--dataset", "bundled", "--eval-fraction", 0, "--block-size", 16]
    code, out, err = call(command, "--model", files / "model", *text, *flags)
    assert code == 0 and "documents of the bundled corpus" in out, err


def test_the_card_of_the_bundled_model():
    results = {"step": 0, "before": {}, "after": {}, "answers": {}}
    card = model_card(resolve("bundled", {}), {}, 48, results, [])
    assert "It has the shape of a small ModernBERT and starts from random weights" in card


def test_the_card_of_models_and_data_of_the_hub():
    """With base model and data set; a long curve is thinned, its ends are kept."""
    commits = {"model_commit": "1" * 40, "dataset_commit": "2" * 40}
    config = resolve("tutorial", commits)
    lines = [
        {"step": step, "epoch": 1.0, "eval_loss": 2.0, "perplexity": 7.4, "eval_accuracy": 0.5}
        for step in range(0, 501, 2)
    ]
    results = {"step": 500, "before": lines[0], "after": lines[-1], "answers": {}}
    card = ModelCard(model_card(config, {"training": "text"}, 8, results, lines))
    assert card.data.base_model == config.model.name and card.data.datasets == [config.text.dataset]
    rows = [line for line in card.content.splitlines() if line.startswith("| ")]
    assert len(rows) <= MAX_ROWS + 2 and rows[1].startswith("| 0 |")
    assert rows[-1].startswith("| 500 |") and f"(commit {'1' * 40})" in card.content


def test_results_are_those_of_the_model_that_is_kept(files):
    run_dir = train(small_config(files, **SETTINGS))
    results = json.loads((run_dir / "results.json").read_text())
    lines = read_metrics(run_dir)
    evaluated = [line for line in lines if "eval_loss" in line]
    fills = [line["watch"] for line in lines if "watch" in line]
    assert results["before"] == evaluated[0] | {"watch": fills[0]}
    assert results["after"] == evaluated[-1] | {"watch": fills[-1]}
    assert results["step"] == results["steps"] == 8 and results["tokens_per_second"] > 0
    plain = train(small_config(files, max_steps=2))
    results = json.loads((plain / "results.json").read_text())
    assert results["before"] == results["after"] == {} and results["step"] == 2
    assert (plain / "model/README.md").is_file()

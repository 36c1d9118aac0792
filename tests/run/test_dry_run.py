"""What a dry run says, held against the run that follows; and mistakes that are named in time."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import train as command
from mlm_scratch.config import changed
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import dry_run
from mlm_scratch.run.build import prepare
from mlm_scratch.run.session import train
from mlm_scratch.run.state import Training
from mlm_scratch.util.runs import checkpoints
from tests.support.tiny import small_config, small_flags, write_text

LINES = {"grouping": "lines", "block_size": 64}


def told(capsys, config):
    """What a dry run prints."""
    dry_run.dry_run(config)
    out = capsys.readouterr().out
    assert not Path("runs").exists() and out.endswith("a dry run: no run was begun\n")
    return out


def number(out, pattern):
    """The number in a dry run's output at the group of a pattern."""
    found = re.search(pattern, out)
    assert found, (pattern, out)
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("settings", [{}, LINES, {"accumulate": 2}], ids=["blocks", "lines", "two"])
def test_the_run_that_follows_has_the_numbers_of_the_dry_run(files, capsys, settings):
    """Its first lines, steps, evaluations, checkpoints, their size, and its first loss."""
    settings = {"eval_fraction": 0.2, "save_every": 3, "keep": 100, "log_every": 1, **settings}
    config = small_config(files, **settings)
    out = told(capsys, config)
    run_dir = train(config)
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(("text:", "model:", "row ", "  token", "  model sees", "  label")):
            assert line in out.splitlines()
    lines, saved = read_metrics(run_dir), checkpoints(run_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert number(out, r"steps: ([\d,]+) \(") == len(losses)
    assert number(out, r"evaluations: ([\d,]+), ") == sum("eval_loss" in line for line in lines)
    assert number(out, r"checkpoints: ([\d,]+) of ") == len(saved)
    assert number(out, r"loss of the first step: ([\d.]+)") == pytest.approx(losses[0], abs=1e-4)
    assert number(out, r"ln 320 = ([\d.]+)") == pytest.approx(math.log(320), abs=1e-4)
    weights_and_state = sum(
        (saved[0] / name).stat().st_size for name in ("model.safetensors", "training_state.pt")
    )
    assert 1e6 * number(out, r"of ([\d.]+) MB, the newest") == pytest.approx(
        weights_and_state,
        rel=0.2,  # the names of a model as small as this
    )


def test_the_text_is_shown_from_its_characters_to_a_row(tmp_path, files, capsys):
    """The second document begins in the second row: after 24 of its tokens, at a border."""
    write_text(tmp_path / "a.txt", ["Water boils."] + ["Paris is a capital of it."] * 9)
    out = told(capsys, small_config(files, train_file=(str(tmp_path / "a.txt"),), block_size=4))
    first = re.search(r"its (\d+) tokens: (.*)", out)
    length = int(first[1])
    assert "the first document, 12 characters: 'Water boils.'\n" in out
    assert first[2].startswith("<s> ") and first[2].endswith((" ...", "</s>"))
    row = re.search(r"row (\d+), 4 tokens; a document begins at (\d+):", out)
    assert (int(row[1]), int(row[2])) == divmod(length, 4)
    assert re.search(rf"\n  {row[2]}: <s> ", out)


def test_what_the_block_size_cuts_off(tmp_path, files, capsys):
    """Of two documents, with 3 and 23 tokens between <s> and </s>."""
    path = tmp_path / "a.txt"
    write_text(path, ["a a a", " ".join("a" * 23)])
    config = small_config(files, train_file=(str(path),), grouping="lines", block_size=10)
    out = told(capsys, config)
    assert number(out, r"cut off by --block-size 10: ([\d.]+)%") == pytest.approx(50, abs=0.05)
    assert re.search(r"row 0, 5 tokens; a document begins at 0:\n  0: <s> ", out)
    assert "tokens per document: median 15, 99 % have at most 24 (2 documents" in out


def test_a_disk_that_is_too_small_is_named(files, capsys, monkeypatch):
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e5))
    dry_run.dry_run(small_config(files))
    assert "warning: the disk has no room for the checkpoints of " in capsys.readouterr().err


@pytest.mark.parametrize("steps, which", [(1, "of a first one"), (3, "median of 2 after")])
def test_a_run_of_a_few_steps(files, capsys, steps, which):
    out = told(capsys, small_config(files, max_steps=steps, no_eval_first=True))
    assert number(out, r"steps: ([\d,]+) \(") == steps and which in out
    assert number(out, r"a step: ([\d.e-]+) s") > 0 and "padding is 0.0% of" in out


def test_with_best_more_checkpoints_may_be_there_at_once(files, capsys):
    """Each of those kept, with the best of its time, and the one that is being written."""
    out = told(capsys, small_config(files, best=True, eval_fraction=0.2, save_every=2))
    size, needed = (number(out, p) for p in (r"of ([\d.]+) MB", r"with model/ ([\d.]+) MB"))
    assert needed == pytest.approx((2 * 2 + 1) * size + size / 3, rel=0.1)
    out = told(capsys, small_config(files, best=True, eval_fraction=0.2, max_steps=1))
    assert number(out, r"with model/ ([\d.]+) MB") == pytest.approx(3 * size + size / 3, rel=0.2)


@pytest.mark.parametrize("every", [0, 1, 3, 4, 10, 11])
def test_what_is_due_is_counted_as_the_run_counts_it(files, every):
    t = prepare(small_config(files, max_steps=10))
    steps = [step for step in range(1, 11) if t.due(every, step)]
    assert dry_run._due(every, 10) == (len(steps), steps[:3])


def test_a_billion_steps_take_no_time_to_count(files, capsys):
    out = told(capsys, small_config(files, max_steps=10**9, eval_fraction=0.2, save_every=7))
    assert number(out, r"checkpoints: ([\d,]+) of") == 142_857_143


def test_a_place_where_no_directory_can_be_made(tmp_path, files, call):
    (tmp_path / "file").touch()
    flags = [*small_flags(files), "--output-dir", tmp_path / "file" / "run", "--dry-run"]
    code, _, err = call(command, *flags)
    assert code == 2 and "file is no directory to write to" in err


def test_an_evaluation_is_tried_beside_the_memory_of_the_steps(files, capsys, monkeypatch):
    """Gradients are gone by then; AdamW's moments are there."""
    evaluate_on, moments = Training.evaluate_on, []

    def noted(self, rows):
        moments.append(len(self.optimizer.state))
        return evaluate_on(self, rows)

    monkeypatch.setattr(Training, "evaluate_on", noted)
    told(capsys, small_config(files, eval_fraction=0.2))
    assert moments and all(moments)


def test_a_stream_is_tried_too(files, capsys):
    settings = {"streaming": True, "max_steps": 5, "eval_fraction": 0.0}
    out = told(capsys, small_config(files, **settings))
    assert number(out, r"steps: ([\d,]+) \(") == 5 and "to the end: " in out


def test_out_of_memory_says_how_the_steps_fit(files, call, monkeypatch):
    def too_large(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")

    monkeypatch.setattr(dry_run.loop, "run_steps", too_large)
    code, _, err = call(command, *small_flags(files), "--dry-run")
    assert code == 2 and "--batch-size 4 --accumulate 2 or --gradient-checkpointing" in err
    flags = ("--dry-run", "--batch-size", 1, "--gradient-checkpointing")
    code, _, err = call(command, *small_flags(files), *flags)
    assert code == 2 and "begin a new run with a smaller --block-size or model" in err


def test_it_goes_with_a_new_run_only(files, call):
    code, _, err = call(command, "--resume", "--dry-run")
    assert code == 2 and "leave out --resume" in err
    train(small_config(files, output_dir="run", max_steps=1))
    code, _, err = call(command, *small_flags(files), "--output-dir", "run", "--dry-run")
    assert code == 2 and "run already holds a run" in err


MISTAKES = {
    "none": ({"lr": 5e-4}, ""),
    "warm-up": ({"warmup_steps": 9, "max_steps": 9}, "rises for 9 steps, but the run has 9:"),
    "warm-up and decay": (
        {"schedule": "wsd", "warmup_steps": 5, "decay_steps": 5, "max_steps": 9},
        "are more than the 9 steps of the run",
    ),
    "passes": ({"max_steps": 99_999}, "99,999 steps read each of the 93 rows 8,333 times"),
    "rate of pretraining": ({"lr": 6e-4}, "--lr 0.0006 fits random weights"),
    "rate of fine-tuning": ({"lr": 1e-5, "init": "scratch"}, "--lr 1e-05 is a rate to fine-tune"),
    "shared": (
        {"eval_file": "a.txt", "eval_fraction": None},
        "100% of the documents to evaluate on are in the training",
    ),
    "few masked": (
        {"eval_fraction": 0.2, "eval_mlm_probability": 0.01},
        "tokens to evaluate on about 2.7 are masked",
    ),
    "files": (
        {"streaming": True, "max_steps": 3, "eval_fraction": 0.0},
        "--streaming: each of 8 shards reads all 1 files",
    ),
    "cut off": ({"grouping": "lines", "block_size": 8}, "of the documents fill all 8 tokens"),
    "wide": ({"grouping": "lines", "train_file": "words"}, "99% of the documents have at most"),
}


@pytest.mark.parametrize("settings, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_at_every_start(tmp_path, files, capsys, monkeypatch, settings, message):
    write_text(tmp_path / "words.txt", ["water", "boils"] * 20)
    places = {"a.txt": (str(files / "a.txt"),), "words": (str(tmp_path / "words.txt"),)}
    settings = {name: places.get(value, value) for name, value in settings.items()}
    if "train_file" in settings:
        settings["block_size"] = 64
    config = changed(small_config(files, lr=5e-4), **settings)
    for start in (dry_run.dry_run, begin_only):
        start(config)
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
        assert len(warnings) == bool(message), warnings
        assert all(message in line for line in warnings)


def begin_only(config):
    prepare(config).source.close()

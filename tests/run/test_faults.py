"""Nothing is lost: kills, signals, full disks, damaged files, two runs at once."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mlm_scratch import loop
from mlm_scratch.config import resolve
from mlm_scratch.data.rows import cache_dir, load_documents, prepare_rows
from mlm_scratch.loop import train
from mlm_scratch.run import build, checkpoint
from mlm_scratch.run.checkpoint import checkpoints, find_fault
from mlm_scratch.run.directory import claim
from mlm_scratch.util.errors import UserError
from tests.support.same import assert_same_run
from tests.support.tiny import SENTENCES, byte_level_tokenizer, small_config

ROOT = Path(__file__).parents[2]


def config(files, **settings):
    """15 steps with an evaluation and a save after every fifth."""
    every_fifth = {"eval_fraction": 0.2, "eval_every": 5, "save_every": 5, "max_steps": 15}
    return small_config(files, **{**every_fifth, **settings})


def command_line(files, *arguments):
    """train.py in a process of its own, on one core."""
    command = [
        sys.executable,
        ROOT / "train.py",
        "--model",
        files / "model",
        "--train-file",
        files / "a.txt",
        "--block-size",
        16,
        "--device",
        "cpu",
        *arguments,
    ]
    return {
        "args": list(map(str, command)),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
    }


# ---- Kills and signals ---------------------------------------------------------------------------


def test_runs_killed_at_random_moments_end_like_those_left_alone():
    """18 kills; `python -m tests.tools.faults --kills 200` is the same for longer."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.tools.faults", "--kills", "18"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "18 kills; every run ended like the one left alone" in result.stdout


@pytest.mark.parametrize(
    "module, name",
    [
        (loop, "evaluate"),
        (build, "save_checkpoint"),
        (loop, "masked_lm_loss"),
    ],
)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_loses_nothing_wherever_it_comes(
    files, monkeypatch, capsys, module, name, number, code
):
    whole = train(config(files, output_dir="whole"))
    settings = config(files, output_dir="stopped run")
    function = getattr(module, name)

    def signalled(*args, **kwargs):
        monkeypatch.setattr(module, name, function)
        os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, signalled)
    with pytest.raises(SystemExit) as stopped:
        train(settings)
    assert stopped.value.code == code
    out, _ = capsys.readouterr()
    assert "go on with: python train.py --resume --output-dir 'stopped run'" in out
    (newest, *_) = checkpoints(Path("stopped run"))
    assert find_fault(newest) is None and not Path("stopped run/model").exists()
    assert newest.name == ("checkpoint-1" if name == "masked_lm_loss" else "checkpoint-5")
    assert_same_run(whole, train(settings, resume=True))


def test_an_evaluation_made_up_for_is_noted_once(files, monkeypatch):
    """Stopped in the evaluation at step 5, then killed after it was made up for."""
    settings = config(files, output_dir="stopped", save_every=7)
    whole = train(replace(settings, output_dir="whole"))
    evaluate, step = loop.evaluate, loop.masked_lm_loss

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "evaluate", signalled)
    with pytest.raises(SystemExit):
        train(settings)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "masked_lm_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings, resume=True)
    monkeypatch.setattr(loop, "masked_lm_loss", step)
    assert '"eval_loss"' in Path("stopped/metrics.jsonl").read_text()
    assert_same_run(whole, train(settings, resume=True))


def test_a_second_interrupt_stops_at_once_and_harms_nothing(files, monkeypatch):
    whole = train(config(files, output_dir="whole"))
    settings = config(files, output_dir="stopped")
    rename = os.rename

    def interrupted(*args):
        if "checkpoint-10" in str(args[1]):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return rename(*args)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    monkeypatch.setattr(os, "rename", rename)
    assert [path.name for path in checkpoints(Path("stopped"))] == ["checkpoint-5"]
    assert not list(Path("stopped").glob(".unfinished*"))
    assert_same_run(whole, train(settings, resume=True))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_a_checkpoint_to_go_on_from(files, number, code):
    process = subprocess.Popen(
        **command_line(files, "--max-steps", 3000, "--log-every", 1, "--save-every", 0)
    )
    metrics = Path("runs/tutorial/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    begin = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and time.monotonic() - begin < 10, err
    assert "python train.py --resume --output-dir runs/tutorial" in out
    (saved,) = checkpoints(Path("runs/tutorial"))
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 5 <= step < 3000
    resumed = subprocess.run(**command_line(files, "--resume", "--max-steps", step + 3))
    assert resumed.returncode == 0 and f"steps {step} to {step + 3}" in resumed.stdout
    assert f"changed: max_steps is {step + 3} now, not 3000" in resumed.stdout
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines())]
    losses = [line for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == sorted(steps) and len(losses) == step + 3


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_tokenizing_ends_at_once_and_leaves_nothing(files, tmp_path, number, code):
    long = tmp_path / "long.txt"
    long.write_text("\n".join(f"{i}: {' '.join(SENTENCES)}" for i in range(60_000)))
    start = command_line(files, "--train-file", long)
    start["env"]["MLM_SCRATCH_CACHE"] = str(tmp_path / "cache")
    process = subprocess.Popen(**start)
    while not list(tmp_path.glob("cache/unfinished-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and time.monotonic() - begin < 10
    assert "Traceback" not in err
    assert not Path("runs").exists() and not list(tmp_path.glob("cache/*"))


# ---- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(files, capsys, damage):
    """Every file of a checkpoint in turn."""
    settings = config(files, output_dir="run")
    whole = train(settings)
    shutil.copytree(whole, "whole")
    newest, before = checkpoints(whole)
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) >= 6 and "manifest.json" in names
    for name in names:
        content = bytearray((newest / name).read_bytes())
        if damage == "cut":
            (newest / name).write_bytes(content[:-1])
        elif damage == "flip":
            content[len(content) // 2] ^= 1
            (newest / name).write_bytes(content)
        else:
            (newest / name).unlink()
        fault = find_fault(newest)
        assert fault is not None and (name in fault or name == "manifest.json")
        capsys.readouterr()
        train(settings, resume=True)
        out, err = capsys.readouterr()
        assert f"{newest} is damaged ({fault}) and left aside" in err
        assert "steps 10 to 15" in out and before.exists()
        assert_same_run(Path("whole"), whole)  # written again


def test_rotation_never_takes_the_one_valid_checkpoint(files):
    settings = config(files, output_dir="run", keep=1)
    train(settings)
    (newest,) = checkpoints(Path("run"))
    (newest / "model.safetensors").write_bytes(b"damaged")
    shutil.rmtree("run/model")
    train(replace(settings, max_steps=10), resume=True)  # from the beginning: nothing is valid
    valid = [path.name for path in checkpoints(Path("run")) if find_fault(path) is None]
    assert valid == ["checkpoint-10"]


def test_a_checkpoint_written_again_is_there_all_the_time(files, monkeypatch):
    """The one checkpoint of a run, killed between the two renames that replace it."""
    settings = config(files, output_dir="run", keep=1)
    train(settings)
    t = build.prepare(settings, Path("run/checkpoint-15"))
    rename = os.rename

    def killed(source, target):
        if ".unfinished" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        t.save(Path("run"))
    monkeypatch.setattr(os, "rename", rename)
    assert checkpoint.newest_valid_checkpoint(Path("run")) == Path("run/checkpoint-15")
    t.save(Path("run"))
    assert not list(Path("run").glob(f"{checkpoint.REPLACED}*"))


def test_a_checkpoint_that_is_not_as_it_was_written_takes_no_older_one(files, monkeypatch):
    settings = config(files, output_dir="run", keep=1)
    rename = os.rename

    def bad_disk(source, target):
        rename(source, target)
        if Path(target).name == "checkpoint-10":
            (Path(target) / "config.json").write_text("{}")

    monkeypatch.setattr(os, "rename", bad_disk)
    with pytest.raises(UserError, match="checkpoint-10 is not as it was written"):
        train(settings)
    assert find_fault(Path("run/checkpoint-5")) is None


def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_once_there_is_room(files):
    """A limit on the size of files stands for the full disk: the system refuses just the same."""
    arguments = ["--output-dir", "run", "--eval-fraction", 0, "--save-every", 5]
    first = subprocess.run(**command_line(files, *arguments, "--max-steps", 5))
    assert first.returncode == 0, first.stderr
    size = max(path.stat().st_size for path in Path("run/checkpoint-5").iterdir())
    for limit in (size // 2, 2000):  # the large files, and nearly all of them
        full = subprocess.run(
            **command_line(files, *arguments, "--max-steps", 10, "--resume"),
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert full.returncode == 2, full.stderr
        assert "Traceback" not in full.stderr
        assert full.stderr.splitlines()[-1].startswith("error: cannot write to run: ")
        assert "python train.py --resume --output-dir run" in full.stderr
        assert find_fault(Path("run/checkpoint-5")) is None
        assert not list(Path("run").glob(".unfinished*"))
    again = subprocess.run(**command_line(files, *arguments, "--max-steps", 10, "--resume"))
    assert again.returncode == 0, again.stderr
    assert "steps 5 to 10" in again.stdout


def test_room_is_looked_for_before_a_save(files, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"checkpoint-5 needs [\d,]+ bytes, and only 1,000"):
        train(config(files, output_dir="run"))
    assert not list(Path("run").glob("*checkpoint*"))


@pytest.mark.parametrize("trouble", ["vanished", "read-only"])
def test_an_output_directory_that_goes_away_is_one_line(files, monkeypatch, trouble):
    settings = config(files, output_dir="run")
    save = build.save_checkpoint

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def troubled(run_dir, step, *args):
        if step == 10 and trouble == "vanished":
            shutil.rmtree(run_dir)
        elif step == 10:
            monkeypatch.setattr(os, "mkdir", refuse)
        return save(run_dir, step, *args)

    monkeypatch.setattr(build, "save_checkpoint", troubled)
    reason = "No such file or directory" if trouble == "vanished" else "Read-only file system"
    with pytest.raises(UserError, match=f"cannot write to run: {reason}"):
        train(settings)
    assert Path("run").exists() == (trouble == "read-only")


# ---- Two at once, and what does not fit ----------------------------------------------------------


def test_a_second_run_in_the_same_directory_is_refused(files):
    settings = config(files, output_dir="run")
    train(settings)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("[!.]*")}
    with claim(Path("run")):
        second = subprocess.run(**command_line(files, "--resume", "--output-dir", "run"))
        assert second.returncode == 2
        assert "error: run is in use by another process" in second.stderr
        assert "Traceback" not in second.stderr
    after = {path: path.stat().st_mtime_ns for path in Path("run").rglob("[!.]*")}
    assert after == before
    train(replace(settings, max_steps=16), resume=True)  # free again


def test_of_two_that_begin_in_one_directory_at_once_one_trains(files):
    start = command_line(files, "--output-dir", "run", "--max-steps", 30)
    both = [subprocess.Popen(**start) for _ in range(2)]
    ends = sorted((process.communicate(timeout=120)[1], process.wait()) for process in both)
    assert sorted(code for _, code in ends) == [0, 2]
    (refused,) = [err for err, code in ends if code == 2]
    assert "in use by another process" in refused or "already holds a run" in refused
    assert Path("run/metrics.jsonl").read_text().count('"loss"') == 3


def test_two_prepare_the_same_text_at_once(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"both {i}: {' '.join(SENTENCES)}" for i in range(2000)))
    settings = resolve(
        "tutorial",
        {
            "train_file": (str(text),),
            "eval_fraction": 0.0,
            "block_size": 16,
        },
    )
    documents, _ = load_documents(settings)
    tokenizer = byte_level_tokenizer()
    children = []
    for _ in range(3):
        if not (child := os.fork()):
            rows = prepare_rows(documents, tokenizer, settings)
            os._exit(0 if len(rows) > 2000 else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert not list(cache_dir().glob("unfinished-*"))


@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_a_run_is_not_resumed_on_another_text(files, tmp_path, which):
    texts = {"training": tmp_path / "a.txt", "evaluation": tmp_path / "b.txt"}
    for text in texts.values():
        shutil.copy(files / "a.txt", text)
    settings = replace(
        config(files, output_dir="run", train_file=(str(texts["training"]),)),
        eval_file=(str(texts["evaluation"]),),
    )
    train(settings)
    texts[which].write_text(texts[which].read_text().replace("0:", "9:"))
    with pytest.raises(UserError, match=f"the {which} text has changed"):
        train(replace(settings, max_steps=16), resume=True)


@pytest.mark.parametrize("name, value", [("mlm_probability", 0.3), ("lr", 1.0), ("seed", 5)])
def test_a_run_json_that_was_edited_does_not_make_it_another_run(files, name, value):
    settings = config(files, output_dir="run")
    train(settings)
    with pytest.raises(UserError, match=f"begun with {name}"):
        train(replace(settings, **{name: value, "max_steps": 16}), resume=True)


def test_a_finished_run_without_a_valid_checkpoint_is_left_alone(files):
    settings = config(files, output_dir="run")
    train(settings)
    for path in checkpoints(Path("run")):
        (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no valid checkpoint to go on from"):
        train(replace(settings, max_steps=20), resume=True)
    assert Path("run/model/model.safetensors").is_file()


def test_what_only_looks_like_a_checkpoint_is_none(files):
    settings = config(files, output_dir="run", keep=1)
    train(settings)
    Path("run/checkpoint-7").write_text("a file")
    Path("run/checkpoint-8").symlink_to(Path("run/checkpoint-15").resolve())
    Path("run/checkpoint-²").mkdir()
    train(replace(settings, max_steps=20), resume=True)
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-20"]


def test_metrics_that_cannot_be_read_are_dropped_with_a_warning(files, capsys):
    settings = config(files, output_dir="run")
    train(settings)
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "garbage\n", *lines[4:]]))
    train(replace(settings, max_steps=16), resume=True)
    assert "warning: metrics.jsonl: dropped from a line on" in capsys.readouterr().err
    assert path.read_text().startswith("".join(lines[:3]))


# ---- Security ------------------------------------------------------------------------------------


class Payload:
    """Leaves a file behind if it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def test_a_checkpoint_runs_no_code(files):
    """A state that somebody else wrote, with a manifest that fits it."""
    settings = config(files, output_dir="run")
    train(settings)
    state = checkpoints(Path("run"))[0] / checkpoint.STATE
    manifest = json.loads((state.parent / checkpoint.MANIFEST).read_text())
    for write in (
        lambda: torch.save({"x": Payload()}, state),
        lambda: state.write_bytes(pickle.dumps(Payload())),
    ):
        write()
        manifest[state.name] = {"size": state.stat().st_size, "sha256": checkpoint.checksum(state)}
        (state.parent / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"training_state\.pt cannot be read"):
            train(settings, resume=True)
    assert not Path("unpickled").exists()


def test_names_that_a_tokenizer_brings_lead_nowhere(files):
    """Chat templates are saved in files that the tokenizer's own configuration names."""
    shutil.copytree(files / "model", "model")
    path = Path("model/tokenizer_config.json")
    templates = [{"name": "default", "template": "x"}, {"name": "../../../out", "template": "x"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    run_dir = train(config(files, model="model", output_dir="a/b/run"))
    assert (run_dir / "model/model.safetensors").is_file()
    assert not list(Path().rglob("*.jinja"))

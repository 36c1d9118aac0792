"""Checkpoints: damaged ones are skipped, valid ones are never lost, none runs code."""

import json
import os
import pickle
import resource
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch

from mlm_scratch.config import changed
from mlm_scratch.run import build
from mlm_scratch.run.checkpoint import remove_old
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.files import checksum
from mlm_scratch.util.runs import (
    MANIFEST,
    REPLACED,
    STATE,
    checkpoints,
    find_fault,
    newest_valid_checkpoint,
    put_back_replaced,
    step_of,
)
from tests.support.processes import Fork
from tests.support.same import assert_same_run
from tests.support.tiny import small_config


def config(files, **settings):
    """15 steps with an evaluation and a save after every fifth."""
    every_fifth = {"eval_fraction": 0.2, "eval_every": 5, "save_every": 5, "max_steps": 15}
    return small_config(files, **{"output_dir": "run", **every_fifth, **settings})


@pytest.mark.parametrize(
    "damage",
    ["cut", *(pytest.param(way, marks=pytest.mark.slow) for way in ("flip", "remove"))],
)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(files, capsys, damage):
    """Every file of a checkpoint in turn."""
    settings = config(files)
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
        assert f"{newest} is damaged ({fault}) and skipped" in err
        assert "steps 10 to 15" in out and before.exists()
        assert_same_run(Path("whole"), whole)  # written again


def test_rotation_never_removes_the_only_valid_checkpoint(files):
    settings = config(files, keep=1)
    train(settings)
    (newest,) = checkpoints(Path("run"))
    (newest / "model.safetensors").write_bytes(b"damaged")
    shutil.rmtree("run/model")
    train(changed(settings, max_steps=10), resume=True)  # from the beginning: nothing is valid
    valid = [path.name for path in checkpoints(Path("run")) if find_fault(path) is None]
    assert valid == ["checkpoint-10"]


def test_a_checkpoint_that_is_replaced_exists_at_all_times(files, monkeypatch):
    """The only checkpoint of a run, with a kill between the two renames that replace it."""
    settings = config(files, keep=1)
    train(settings)
    t = build.prepare(settings, Path("run/checkpoint-15"))
    t.run_dir = Path("run")
    rename = os.replace

    def killed(source, target):
        if ".unfinished" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        t.save()
    monkeypatch.setattr(os, "replace", rename)
    replaced = Path(f"run/{REPLACED}checkpoint-15")
    assert newest_valid_checkpoint(Path("run")) == replaced  # who only reads changes nothing
    assert replaced.is_dir()
    put_back_replaced(Path("run"))
    assert newest_valid_checkpoint(Path("run")) == Path("run/checkpoint-15")
    t.save()
    assert not list(Path("run").glob(f"{REPLACED}*"))


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(files, monkeypatch):
    """As after a power cut: what was not synced before the rename may be missing or empty."""
    done, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append((path.name, [each.name for each in path.glob("*")] if path.is_dir() else None))
        fsync(descriptor)

    def noted_replace(source, target):
        replace(source, target)
        done.append(("renamed to", Path(target).name))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    train(config(files, max_steps=5, eval_fraction=0.0, eval_every=0))
    renamed = done.index(("renamed to", "checkpoint-5"))
    before, (after, listed) = done[:renamed], done[renamed + 1]
    names = {path.name for path in Path("run/checkpoint-5").iterdir()}
    assert len(names) >= 6 and names <= {name for name, _ in before}
    (inside,) = [entries for name, entries in before if name == ".unfinished-checkpoint-5"]
    assert {*inside} == names
    assert after == "run" and "checkpoint-5" in listed  # and then the name itself
    assert ("run.json", None) in done or (".run.json", None) in done


@pytest.mark.parametrize(
    "present, kept",
    [
        ([5, 10, 12], [12, 10]),
        ([5, 10, 12, 15], [15, 10]),
        ([5, 7, 8, 9], [9, 5]),
        ([10, 15, 20], [20, 15]),
        ([3], [3]),
    ],
)
def test_checkpoints_of_a_signal_displace_no_scheduled_ones(tmp_path, present, kept):
    """One is scheduled every fifth step, and 2 are kept."""
    for step in [*present, 99]:  # a later one, from before a resume, is left alone
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, present[-1], 2, lambda step: step % 5 == 0, lambda step: None)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [99, *kept]


def test_a_checkpoint_that_fails_verification_replaces_no_older_one(files, monkeypatch):
    rename = os.replace

    def bad_disk(source, target):
        rename(source, target)
        if Path(target).name == "checkpoint-10":
            (Path(target) / "config.json").write_text("{}")

    monkeypatch.setattr(os, "replace", bad_disk)
    with pytest.raises(UserError, match="checkpoint-10 is not as it was written"):
        train(config(files, keep=1))
    assert find_fault(Path("run/checkpoint-5")) is None


@pytest.mark.slow
def test_a_full_disk_is_reported_in_one_line_and_the_run_resumes_once_there_is_space(files):
    """A limit on the size of files stands for the full disk: the system calls fail alike."""
    settings = config(files, eval_fraction=0.0, eval_every=0, max_steps=5)
    train(settings)
    size = max(path.stat().st_size for path in Path("run/checkpoint-5").iterdir())
    for limit in (size // 2, 2000):  # the large files, and nearly all of them
        code, _, err = Fork(
            changed(settings, max_steps=10),
            "--resume",
            before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
        ).finish()
        assert code == 2, err
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: cannot write to run: ")
        assert "python train.py --resume --output-dir run" in err
        assert find_fault(Path("run/checkpoint-5")) is None
        assert not list(Path("run").glob(".unfinished*"))
    train(changed(settings, max_steps=10), resume=True)
    assert checkpoints(Path("run"))[0].name == "checkpoint-10"


def test_free_space_is_checked_before_a_save(files, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"checkpoint-5 needs [\d,]+ bytes, and only 1,000"):
        train(config(files))
    assert not list(Path("run").glob("*checkpoint*"))


def test_a_finished_run_without_a_valid_checkpoint_is_left_alone(files):
    settings = config(files)
    train(settings)
    for path in checkpoints(Path("run")):
        (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no valid checkpoint to go on from"):
        train(changed(settings, max_steps=20), resume=True)
    assert Path("run/model/model.safetensors").is_file()


def test_what_only_looks_like_a_checkpoint_is_ignored(files):
    settings = config(files, keep=1)
    train(settings)
    Path("run/checkpoint-7").write_text("a file")
    Path("run/checkpoint-8").symlink_to(Path("run/checkpoint-15").resolve())
    Path("run/checkpoint-²").mkdir()
    train(changed(settings, max_steps=20), resume=True)
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-20"]


# ---- Security ------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning")
def test_a_checkpoint_runs_no_code(files):
    """A state written by somebody else, with a manifest that matches it."""
    settings = config(files)
    train(settings)
    path = checkpoints(Path("run"))[0] / STATE
    manifest = json.loads((path.parent / MANIFEST).read_text())
    for write in (
        lambda: torch.save({"x": Payload()}, path),
        lambda: path.write_bytes(pickle.dumps(Payload())),
    ):
        write()
        manifest[path.name] = {"size": path.stat().st_size, "sha256": checksum(path)}
        (path.parent / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"training_state\.pt cannot be read"):
            train(settings, resume=True)
    assert not Path("unpickled").exists()


def test_file_names_from_a_tokenizer_are_not_used(files):
    """Chat templates are saved in files that the tokenizer's own configuration names."""
    shutil.copytree(files / "model", "model")
    path = Path("model/tokenizer_config.json")
    templates = [{"name": "default", "template": "x"}, {"name": "../../../out", "template": "x"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    run_dir = train(config(files, model="model", output_dir="a/b/run"))
    assert (run_dir / "model/model.safetensors").is_file()
    assert not list(Path().rglob("*.jinja"))

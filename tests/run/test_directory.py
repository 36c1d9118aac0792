"""Run directories: names, and two runs that want the same one."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import train as command
from mlm_scratch.config import changed
from mlm_scratch.run.directory import claim, make_run_dir, resumed_config
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from tests.support.processes import Fork
from tests.support.tiny import small_config, small_flags


def test_runs_that_start_at_the_same_time_get_separate_directories(files):
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(make_run_dir, [small_config(files)] * 20))
    assert len(set(made)) == 20


def test_a_second_run_in_the_same_directory_is_refused(files, call):
    settings = small_config(files, output_dir="run", max_steps=4)
    train(settings)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("[!.]*")}
    with claim(Path("run")):
        code, _, err = call(command, *small_flags(files), "--resume", "--output-dir", "run")
        assert code == 2
        assert "error: run is in use by another process" in err
        assert "Traceback" not in err
    after = {path: path.stat().st_mtime_ns for path in Path("run").rglob("[!.]*")}
    assert after == before
    train(changed(settings, max_steps=5), resume=True)  # free again


@pytest.mark.slow
def test_of_two_runs_that_start_in_one_directory_one_trains(files):
    forks = [Fork(*small_flags(files), "--output-dir", "run", "--max-steps", 30) for _ in range(2)]
    ends = [fork.finish() for fork in forks]
    assert sorted(code for code, _, _ in ends) == [0, 2]
    (refused,) = [err for code, _, err in ends if code == 2]
    assert "in use by another process" in refused or "already holds a run" in refused
    assert Path("run/metrics.jsonl").read_text().count('"loss"') == 3


def _flat(noted):
    settings = noted["config"]
    noted["config"] = {"recipe": settings.pop("recipe")}
    for section in settings.values():
        noted["config"] |= section


OTHER_VERSIONS = {
    "flat": _flat,
    "no section": lambda noted: noted["config"].pop("text"),
    "another section": lambda noted: noted["config"].update(network={}),
    "a list for a section": lambda noted: noted["config"].update(text=[]),
    "no setting": lambda noted: noted["config"]["text"].pop("split"),
    "a setting elsewhere": lambda noted: noted["config"]["text"].update(lr=1.0),
    "another recipe": lambda noted: noted["config"].update(recipe="cake"),
}


@pytest.mark.parametrize("name", OTHER_VERSIONS)
def test_a_run_with_other_settings_than_this_version_has_is_refused(files, name):
    run_dir = train(small_config(files, output_dir="run", max_steps=1))
    noted = json.loads((run_dir / "run.json").read_text())
    OTHER_VERSIONS[name](noted)
    (run_dir / "run.json").write_text(json.dumps(noted))
    with pytest.raises(UserError, match="run was begun by another version: begin a new run"):
        resumed_config("run", {})


@pytest.mark.parametrize(
    "section, setting, value, message",
    [
        ("optimization", "lr", "x", "--lr must be of type"),
        ("evaluation", "watch", [1], "--watch must be a list of texts"),
    ],
)
def test_an_edited_setting_is_named(files, section, setting, value, message):
    run_dir = train(small_config(files, output_dir="run", max_steps=1))
    noted = json.loads((run_dir / "run.json").read_text())
    noted["config"][section][setting] = value
    (run_dir / "run.json").write_text(json.dumps(noted))
    with pytest.raises(UserError, match=message):
        resumed_config("run", {})
    (run_dir / "run.json").write_text(json.dumps(noted | {"processes": 0}))
    with pytest.raises(UserError, match=r"run\.json cannot be read: 0 processes"):
        resumed_config("run", {})

"""Run directories: names, and two runs that want the same one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import train as command
from mlm_scratch.config import changed
from mlm_scratch.run.directory import claim, make_run_dir
from mlm_scratch.run.session import train
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


def test_of_two_runs_that_start_in_one_directory_one_trains(files):
    forks = [Fork(*small_flags(files), "--output-dir", "run", "--max-steps", 30) for _ in range(2)]
    ends = [fork.finish() for fork in forks]
    assert sorted(code for code, _, _ in ends) == [0, 2]
    (refused,) = [err for code, _, err in ends if code == 2]
    assert "in use by another process" in refused or "already holds a run" in refused
    assert Path("run/metrics.jsonl").read_text().count('"loss"') == 3

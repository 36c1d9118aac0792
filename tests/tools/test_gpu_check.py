"""The program for the day a GPU is there, whole, on a CPU."""

import json
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from tests.tools import gpu_check
from tests.tools.gpu_check import TINY, Check, Entry

COMPILED = "2 x 16, bf16, compiled"
STEPS = ["2 x 16, bf16", "4 x 16, bf16", COMPILED, "2 x 16, fp16", "2 x 16, fp32"]
PROFILES = ["profile of a step", "profile of a large step, compiled"]
RUNS = ["train.py, auto", "train.py, fp16", "train.py, killed and resumed"]
WITHOUT = [f"without {part}" for part in (*gpu_check.PARTS, "background writer")]
OTHERS = ["tests marked cuda", *PROFILES, *RUNS, "train.py, out of memory"]
OTHERS += ["all-reduce with one rank", *WITHOUT, "losses from random weights"]
NEEDS_COMPILER = (COMPILED, "profile of a large step, compiled")


def entries_of(path):
    return {entry["name"]: entry for entry in json.loads(path.read_text())["entries"]}


def rows_of(output):
    """The cells of the table, by the name of the row."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line[:2] == "| "]
    return {line[0]: line for line in lines[1:]}


@pytest.mark.slow
def test_all_of_it_in_two_calls(call, tmp_path, monkeypatch):
    """The first of which has no time for anything but the tests marked `cuda`."""
    path = tmp_path / "all.json"
    code, output, errors = call(gpu_check, "--tiny", "--minutes", 0, "--output", path)
    assert code == 0, errors
    entries = entries_of(path)
    assert sorted(entries) == sorted(STEPS + OTHERS)
    assert {entry["failure"] for entry in entries.values()} == {"not reached: out of time"}
    assert {cells[-1] for cells in rows_of(output).values()} == {"not reached: out of time"}
    assert output.count("not measured") == 4
    code, output, errors = call(gpu_check, "--tiny", "--output", path)
    assert code == 0, errors
    entries = entries_of(path)
    assert sorted(entries) == sorted(STEPS + OTHERS)
    assert sorted(rows_of(output)) == sorted(STEPS)
    for name, entry in entries.items():
        if name in NEEDS_COMPILER and not shutil.which("g++"):
            assert entry["failure"]
            continue
        assert not entry["failure"], entry
        if name == "train.py, out of memory" and not torch.cuda.is_available():
            continue
        numbers = [v for v in entry["values"].values() if isinstance(v, int | float)]
        assert numbers and all(number >= 0 for number in numbers)
        for value, reason in ((v, entry["missing"].get(k)) for k, v in entry["values"].items()):
            assert bool(reason) == (value is None)
        if name in STEPS:
            assert entry["values"]["ratio"] > 0 and entry["values"]["tokens_per_second"] > 0
    for name in RUNS:
        assert entries[name]["values"]["exit_code"] == 0, entries[name]
    assert entries["train.py, auto"]["values"]["steps"] == TINY.run[1]
    assert entries["all-reduce with one rank"]["values"]["largest_difference"] < 1e-5
    with monkeypatch.context() as patch:  # a third call has nothing to measure
        patch.setattr(Check, "our_steps", None)
        assert call(gpu_check, "--tiny", "--output", path)[0] == 0
    assert entries_of(path) == entries
    if torch.cuda.is_available():
        return
    killed = entries["train.py, killed and resumed"]["values"]
    assert killed["same_metrics"] == 1 and killed["largest_difference"] == 0
    assert 0 < killed["killed_at"] < TINY.run[1]
    assert entries["tests marked cuda"]["values"]["skipped"] > 5
    assert set(entries["profile of a step"]["missing"]) == {
        *("launches", "copies", "busy_seconds", "gap_seconds", "kernels")
    }
    losses = entries["losses from random weights"]["values"]
    assert len(losses["fp32_means_of_2"]) == 10
    assert losses["fp32_means_of_2"][-1] < losses["fp32_means_of_2"][0]
    assert 0 < losses["bf16_largest_difference"] < 0.05


def test_figures_of_another_version_are_not_mixed_in(call, tmp_path):
    path = tmp_path / "old.json"
    facts = gpu_check.environment(torch.device("cpu"))
    facts |= {"scale": "tiny", "source": "123456789abc"}
    path.write_text(json.dumps({"environment": facts, "entries": []}))
    code, _, errors = call(gpu_check, "--tiny", "--output", path)
    assert code == 2 and "is of source 123456789abc, not " in errors


def test_an_entry_that_raises_or_runs_on_is_recorded_and_the_rest_still_run():
    def fill(entry):
        entry.values = {"a": 1, "peak_gigabytes": None}

    def raise_error(entry):
        entry.values = {"part": 1}
        raise RuntimeError("inductor raised:\nno compiler\nand a long story")

    def run_on(entry):
        signal.raise_signal(signal.SIGALRM)  # what the timer sends at the deadline

    an_hour = 3600
    tasks = [
        (Entry("raises"), raise_error, 0),
        (Entry("fine"), fill, 0),
        (Entry("long"), fill, 2 * an_hour),
        (Entry("runs on"), run_on, 0),
        (Entry("next"), fill, 0),
    ]
    entries = list(gpu_check.run_tasks(tasks, time.monotonic() + an_hour))
    assert [entry.failure for entry in entries] == [
        "RuntimeError: inductor raised: no compiler",
        "",
        "not reached: out of time",
        "TimeoutError: out of time",
        "",
    ]
    assert entries[0].values == {"part": 1}
    assert entries[1].missing == {"peak_gigabytes": "only a GPU shows it"}


def test_the_timer_interrupts_what_runs_too_long():
    with pytest.raises(TimeoutError), gpu_check.interrupted_after(0.01):
        while True:
            time.sleep(0.01)


@pytest.mark.slow
def test_what_trainer_raises_leaves_our_numbers(tmp_path, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu_check, "run_trainer", refuse)
    check = Check(TINY, torch.device("cpu"), tmp_path)
    (task,) = check.step_tasks((2,), ("fp32",), False)
    (entry,) = gpu_check.run_tasks([task], time.monotonic() + 60)
    assert entry.values["tokens_per_second"] > 0 and entry.values["ratio"] is None
    assert entry.missing["ratio"] == "OutOfMemoryError: CUDA out of memory."
    assert "OutOfMemoryError" in gpu_check.table([entry])[-1]


def test_every_word_of_the_random_text_is_one_id(tmp_path):
    check = Check(TINY, torch.device("cpu"), tmp_path)
    t = gpu_check.prepare(check.config(check.random_ids, 2, "fp32"))
    words = (check.random_ids / "text.txt").read_text().split()
    assert t.loader.rows.tokens.tolist() == list(map(int, words))
    assert len(t.loader.rows) == TINY.text and t.tokenizer.mask_token_id == 299


def test_kernels_are_counted_and_gaps_are_what_they_leave():
    def event(name, start, end, device=DeviceType.CUDA, annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, time_range=span, device_type=device, is_user_annotation=annotation
        )

    events = [
        event("gemm", 0, 10),
        event("gemm", 20, 40),
        event("norm", 30, 50),  # beside the second
        event("Memcpy HtoD", 60, 61),
        event("aten::mm", 0, 100, DeviceType.CPU),
        event("Optimizer.step", 0, 100, annotation=True),
    ]
    figures = gpu_check.kernel_figures(events, 100e-6)
    assert (figures["launches"], figures["copies"]) == (3, 1)
    assert figures["busy_seconds"] == pytest.approx(41e-6)
    assert figures["gap_seconds"] == pytest.approx(59e-6)
    assert [(kernel["name"], kernel["calls"]) for kernel in figures["kernels"]] == [
        ("gemm", 2),
        ("norm", 1),
    ]


def test_aims_are_judged_by_the_better_step_in_bf16():
    def step(rows, ratio, speed, precision="bf16", compiled=False):
        kind = {"rows": rows, "precision": precision, "compiled": compiled}
        values = {"ratio": ratio, "tokens_per_second": speed}
        return Entry(f"{rows} {precision} {compiled}", kind, values)

    entries = [
        step(8, 2.0, 3e5),
        step(8, 3.5, 3.9e5, compiled=True),
        step(8, 9.0, 9e5, "fp32"),
        step(256, None, 1.4e6),
        Entry("no step"),
    ]
    assert gpu_check.verdicts(entries) == [
        "- 3 x Trainer with 8 rows: reached, 3.50 x (8 bf16 True)",
        "- 400 k tokens/s with 8 rows: not reached, 390,000 tokens/s (8 bf16 True)",
        "- 1.33 M tokens/s with 256 rows: reached, 1,400,000 tokens/s (256 bf16 False)",
        "- 1.33 M tokens/s with 1024 rows: not measured",
    ]


def test_counts_of_the_cuda_tests(monkeypatch):
    output = (
        "...\n= 2 failed, 11 passed, 3 skipped, 1 xfailed, 900 deselected, 2 errors in 9.1s =\n"
    )
    result = SimpleNamespace(returncode=1, stdout=output, stderr="a warning\n")
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: result)
    entry = Entry("tests")
    gpu_check.run_tests(entry)
    counts = {"passed": 11, "failed": 2, "error": 2, "skipped": 3, "xfailed": 1, "exit_code": 1}
    assert entry.values == {**counts, "output": ["a warning", *output.splitlines()]}

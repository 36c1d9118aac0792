"""Several processes are one run: the real torchrun, with 2 and 4 processes over gloo."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from mlm_scratch.config import resolve
from mlm_scratch.loop import train
from mlm_scratch.run.checkpoint import checkpoints, find_fault, step_of
from mlm_scratch.run.metrics import read_metrics
from tests.support.tiny import SENTENCES, save_roberta, small_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without dropout, and 54 documents of different lengths. 41 of them are to train on:
    with 16 rows in a step the last one of an epoch has 9, of which the last of 4 gets none."""
    directory = tmp_path_factory.mktemp("files")
    save_roberta(directory / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    texts = [f"{i} {text * (1 + i % 3)}" for i in range(9) for text in SENTENCES]
    (directory / "a.txt").write_text("\n".join(texts))
    return directory


def config(files, **settings):
    """9 steps of 16 rows in one process, with evaluations and checkpoints."""
    return small_config(
        files,
        **{
            "grouping": "lines",
            "block_size": 48,
            "eval_fraction": 0.25,
            "batch_size": 16,
            "eval_batch_size": 2,
            "log_every": 1,
            "eval_every": 4,
            "epochs": 3.0,
            "save_every": 3,
            "keep": 9,
            **settings,
        },
    )


def launch(processes, *settings, restarts=0):
    """Start torchrun with train.py, given a config or flags."""
    flags = []
    for given in settings:
        flags += flags_of(given) if dataclasses.is_dataclass(given) else [given]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
        "--max-restarts",
        restarts,
        ROOT / "train.py",
        *flags,
    ]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def flags_of(config):
    """The flags that lead to `config`."""
    named = {"model": config.model, "train_file": config.train_file}
    implied = dataclasses.asdict(resolve("tutorial", named))
    values = dataclasses.asdict(config)
    for name, value in values.items():
        if name in named or value != implied[name]:
            yield "--" + name.replace("_", "-")
            if value is not True:
                yield from value if isinstance(value, tuple) else (value,)


def finish(process):
    """(exit code, stdout, stderr) of what was started."""
    try:
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err
    finally:
        process.kill()


def assert_same_curve(one, other):
    """Losses and gradient norms agree to 1e-5, and so do the weights at the end."""
    lines, other_lines = read_metrics(Path(one)), read_metrics(Path(other))
    assert len(lines) == len(other_lines) > 0
    for line, other_line in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(other_line, rel=1e-5)
    weights, other_weights = (
        load_file(Path(run, "model/model.safetensors")) for run in (one, other)
    )
    for name in weights:
        if not name.endswith("key.bias"):  # softmax ignores it: its gradient is rounding alone
            assert_close(weights[name], other_weights[name], rtol=1e-4, atol=1e-5)


def forget_after(step, run):
    """Leave a run as a kill after this step would."""
    for checkpoint in checkpoints(run):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """The run by one process, without accumulation."""
    return train(config(files, output_dir=str(tmp_path_factory.mktemp("alone"))))


@pytest.mark.parametrize("processes, batch_size, accumulate", [(2, 4, 2), (4, 4, 1)])
def test_any_number_of_processes_has_the_same_loss_curve(
    files, alone, processes, batch_size, accumulate
):
    settings = config(files, output_dir="run", batch_size=batch_size, accumulate=accumulate)
    code, out, err = finish(launch(processes, settings))
    assert code == 0, err
    assert_same_curve(alone, "run")
    assert f"steps 0 to 9, {processes} processes" in out and out.count("run: ") == 1
    assert {path.name for path in Path("run").iterdir()} == {path.name for path in alone.iterdir()}
    assert len(list(Path("run/logs").iterdir())) == 1  # one of them writes


def test_a_checkpoint_resumes_on_fewer_and_on_more_processes(files, alone):
    run = Path("run")
    code, _, err = finish(launch(2, config(files, output_dir="run", batch_size=8)))
    assert code == 0, err
    for processes, step, words in (
        (1, 3, "begun by 2 processes, now 1, each with batch_size 8 and accumulate 2"),
        (4, 6, "begun by 2 processes, now 4, each with batch_size 4 and accumulate 1"),
    ):
        forget_after(step, run)
        code, out, err = finish(launch(processes, "--resume", "--output-dir", run))
        assert code == 0, err
        assert words in out and f"steps {step} to 9" in out
        assert_same_curve(alone, run)


# ---- Processes that end too early ----------------------------------------------------------------


def many_steps(files, **settings):
    """300 steps: time enough to disturb them."""
    return config(
        files,
        output_dir="run",
        batch_size=8,
        epochs=100.0,
        eval_every=1000,
        save_every=30,
        **settings,
    )


def rank(number, process):
    """The id of one of the processes that a launch has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={number}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {number} among {children}")


def wait_for(path):
    """Until the run has come so far."""
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def test_a_signal_to_one_process_saves_once(files):
    settings = many_steps(files)
    process = launch(2, settings)
    wait_for(Path("run/checkpoint-30"))
    os.kill(rank(1, process), signal.SIGTERM)
    code, out, err = finish(process)
    assert code != 0 and out.count("stopped; go on with: ") == 1
    newest, *others = checkpoints(Path("run"))
    assert step_of(newest) == read_metrics(Path("run"))[-1]["step"]  # where both stopped
    assert not any(step_of(path) % 30 for path in others) and find_fault(newest) is None
    whole = train(dataclasses.replace(settings, batch_size=16, output_dir="whole"))
    code, _, err = finish(launch(2, "--resume", "--output-dir", "run"))
    assert code == 0, err
    assert_same_curve(whole, "run")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_others(files, killed):
    process = launch(2, many_steps(files))
    wait_for(Path("run/checkpoint-30"))
    begin = time.monotonic()
    os.kill(rank(killed, process), signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0 and time.monotonic() - begin < 60
    assert "error" in err and "another process of this run is gone or out of reach" in err
    assert "mlm_scratch/loop.py" not in err  # no traceback of ours


def test_processes_that_are_started_again_go_on_by_themselves(files):
    settings = many_steps(files)
    process = launch(2, settings, restarts=1)
    wait_for(Path("run/checkpoint-30"))
    os.kill(rank(1, process), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert out.count("steps 0 to 300") == 1
    whole = train(dataclasses.replace(settings, batch_size=16, output_dir="whole"))
    assert_same_curve(whole, "run")

"""Several ranks are one run: 1, 2 and 4 processes over gloo, also under the real torchrun."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from mlm_scratch.config import changed
from mlm_scratch.parallel import ranks
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.runs import checkpoints, find_fault, step_of
from tests.support.processes import (
    Fork,
    finish,
    forget_after,
    forked,
    torchrun,
    wait_until,
)
from tests.support.same import assert_same_curve, assert_same_run
from tests.support.tiny import NO_DROPOUT, SENTENCES, save_files, small_config

STARTS = [forked, pytest.param(torchrun, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without dropout, and 54 documents of different lengths. 41 of them are to train on:
    with 16 rows per step, the last step of an epoch has 9, and the last of 4 ranks none of them."""
    texts = [f"{i} {text * (1 + i % 3)}" for i in range(9) for text in SENTENCES]
    return save_files(tmp_path_factory.mktemp("files"), texts, **NO_DROPOUT)


def config(files, **settings):
    """9 steps of 16 rows on one rank, with evaluations and checkpoints."""
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
            "best": True,
            "watch": ("Water [boils] at one hundred.",),
            **settings,
        },
    )


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """The run of one process, without accumulation."""
    return train(config(files, output_dir=str(tmp_path_factory.mktemp("alone"))))


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("processes, batch_size, accumulate", [(2, 4, 2), (4, 4, 1)])
def test_any_number_of_processes_has_the_same_loss_curve(
    files, alone, start, processes, batch_size, accumulate
):
    settings = config(files, output_dir="run", batch_size=batch_size, accumulate=accumulate)
    code, out, err = finish(start(processes, settings))
    assert code == 0, err
    run = Path("run")
    assert_same_curve(alone, run)
    assert f"steps 0 to 9, {processes} processes" in out and out.count("run: ") == 1
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert len(list((run / "logs").iterdir())) == 1  # only rank 0 writes


def test_ddp_knows_its_gpu_and_keeps_no_second_copy_of_the_gradients(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        ranks, "DistributedDataParallel", lambda model, **given: seen.update(given) or Mock()
    )
    monkeypatch.setattr(ranks, "_nccl_group", lambda: "nccl")
    gpu = torch.device("cuda:1")
    ranks.Ranks(size=2).wrap(torch.nn.Linear(1, 1), gpu)
    assert seen["device_ids"] == [gpu] and seen["process_group"] == "nccl"
    assert seen["gradient_as_bucket_view"]
    ranks.Ranks(size=2).wrap(torch.nn.Linear(1, 1), torch.device("cpu"))
    assert seen["device_ids"] is None and seen["process_group"] is None


def test_a_resume_on_other_processes_may_split_the_rows_as_it_likes(files, monkeypatch):
    """8 rows of one process as 2 x 2 of two, although accumulate 2 is what it was."""
    train(config(files, output_dir="run", batch_size=4, accumulate=2, max_steps=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    resumed = resumed_config("run", {"batch_size": 2, "accumulate": 2})
    assert (resumed.optimization.batch_size, resumed.optimization.accumulate) == (2, 2)
    again = resumed_config("run", {"batch_size": 4, "accumulate": 2})  # the same command line
    assert again.optimization.batch_size * again.optimization.accumulate == 4
    with pytest.raises(UserError, match="keep their product"):
        resumed_config("run", {"batch_size": 3})


@pytest.mark.slow
def test_a_checkpoint_resumes_on_fewer_and_on_more_processes(files, alone):
    run = Path("run")
    code, _, err = finish(forked(2, config(files, output_dir="run", batch_size=8)))
    assert code == 0, err
    for processes, step, words in (
        (1, 3, "begun by 2 processes, now 1, each with batch_size 8 and accumulate 2"),
        (4, 6, "begun by 2 processes, now 4, each with batch_size 4 and accumulate 1"),
    ):
        forget_after(step, run)
        code, out, err = finish(forked(processes, "--resume", "--output-dir", run))
        assert code == 0, err
        assert words in out and f"steps {step} to 9" in out
        assert_same_curve(alone, run)


@pytest.mark.slow
def test_a_resume_on_two_processes_has_the_dropout_of_each(tmp_path):
    """Bit for bit the run that never stopped."""
    texts = [f"{i} {text}" for i in range(9) for text in SENTENCES]
    with_dropout = save_files(tmp_path, texts)
    settings = config(with_dropout, batch_size=8, epochs=2.0)
    code, _, err = finish(forked(2, changed(settings, output_dir="whole")))
    assert code == 0, err
    shutil.copytree("whole", "run")
    forget_after(3, Path("run"))
    code, _, err = finish(forked(2, "--resume", "--output-dir", "run"))
    assert code == 0, err
    assert_same_run(Path("whole"), Path("run"))


# ---- Ranks that end early ------------------------------------------------------------------------


def many_steps(files, **settings):
    """150 steps: long enough to be disturbed."""
    return config(
        files,
        **{"output_dir": "run", "epochs": 50.0, "save_every": 10, "eval_every": 1000},
        **settings,
    )


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    """The same steps by one process."""
    return train(changed(many_steps(files), output_dir=str(tmp_path_factory.mktemp("whole"))))


def pid_of(rank: int, launched: subprocess.Popen | list[Fork]) -> int:
    """The process id of a rank."""
    if isinstance(launched, list):
        return launched[rank].process.pid
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_once_and_stops_all(files, undisturbed):
    launched = torchrun(2, many_steps(files, batch_size=8))
    wait_until(Path("run/checkpoint-10").exists, launched)
    os.kill(pid_of(1, launched), signal.SIGTERM)
    code, out, err = finish(launched)
    assert code != 0 and out.count("stopped; go on with: ") == 1
    newest, *others = checkpoints(Path("run"))
    assert step_of(newest) == read_metrics(Path("run"))[-1]["step"]  # where both stopped
    assert not any(step_of(path) % 10 for path in others) and find_fault(newest) is None
    code, _, err = finish(forked(2, "--resume", "--output-dir", "run"))
    assert code == 0, err
    assert_same_curve(undisturbed, Path("run"))


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_ends_the_others(files, start, killed):
    launched = start(2, many_steps(files, batch_size=8))
    wait_until(Path("run/checkpoint-10").exists, launched)
    os.kill(pid_of(killed, launched), signal.SIGKILL)
    code, _, err = finish(launched)
    assert code != 0
    assert "another process of this run is gone or out of reach" in err, err
    assert "mlm_scratch/loop.py" not in err  # no traceback of ours


@pytest.mark.slow
def test_ranks_that_torchrun_restarts_go_on_by_themselves(files, undisturbed):
    launched = torchrun(2, many_steps(files, batch_size=8), restarts=1)
    wait_until(Path("run/checkpoint-10").exists, launched)
    os.kill(pid_of(1, launched), signal.SIGKILL)
    code, out, err = finish(launched)
    assert code == 0, err
    assert out.count("steps 0 to 150") == 1
    assert_same_curve(undisturbed, Path("run"))

"""Out of memory is one line that says how the same steps fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import RobertaForMaskedLM
from transformers.models.roberta.modeling_roberta import RobertaIntermediate

import infer
import train as command
from mlm_scratch.hf.checks import ignores_padding, sparse_head_works
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.model import MaskedLM
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import state
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError, is_out_of_memory
from tests.support.processes import ROOT
from tests.support.tiny import small_config, small_flags


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


def test_a_step_that_does_not_fit_goes_on_in_halves(files_without_dropout, monkeypatch, call):
    """With the flags that the error names: the same steps, up to rounding."""
    settings = {"max_steps": 9, "log_every": 1, "save_every": 4, "lr": 1e-4}
    whole = read_metrics(train(small_config(files_without_dropout, **settings)))
    forward, batches = MaskedLM.forward, []

    def full(self, batch):
        batches.append(len(batch.input_ids))
        if batches[-1] > 4 and len(batches) > 6:
            out_of_memory()
        return forward(self, batch)

    monkeypatch.setattr(MaskedLM, "forward", full)
    with pytest.raises(UserError) as raised:
        train(small_config(files_without_dropout, output_dir="run", **settings))
    assert str(raised.value) == (
        "out of memory: the same steps fit with: python train.py --resume --output-dir run "
        "--batch-size 4 --accumulate 2 or --gradient-checkpointing"
    )
    code, out, err = call(
        command, "--resume", "--output-dir", "run", "--batch-size", 4, "--accumulate", 2
    )
    assert code == 0 and "steps 4 to 9" in out, err
    assert set(batches[7:]) <= {4, 1, 3, 2}
    noted = json.loads(Path("run/run.json").read_text())
    settings = noted["config"]["optimization"]
    assert settings["batch_size"] == 4 and settings["accumulate"] == 2
    for one, other in zip(whole, read_metrics(Path("run")), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    code, _, err = call(command, "--resume", "--output-dir", "run", "--batch-size", 2)
    assert code == 2 and "keep their product" in err


@pytest.mark.parametrize(
    "settings, flags",
    [
        ({"batch_size": 9}, "--batch-size 3 --accumulate 3 or --gradient-checkpointing"),
        (
            {"batch_size": 5, "accumulate": 2, "gradient_checkpointing": True},
            "--batch-size 1 --accumulate 10",
        ),
        ({"batch_size": 1}, "--gradient-checkpointing"),
        (
            {"batch_size": 1, "gradient_checkpointing": True},
            "begin a new run with a smaller --block-size or model",
        ),
    ],
)
def test_the_advice_can_be_followed(files, monkeypatch, settings, flags):
    monkeypatch.setattr(MaskedLM, "forward", out_of_memory)
    with pytest.raises(UserError) as raised:
        train(small_config(files, output_dir="run", max_steps=2, **settings))
    assert str(raised.value).endswith(f" {flags}")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_every_device_has_its_own_words_for_it(error):
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("device-side assert"))


def test_an_evaluation_that_does_not_fit_goes_on_with_smaller_batches(files, monkeypatch, call):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--eval-batch-size"):
        patch.setattr(state, "evaluate", out_of_memory)
        settings = {"eval_fraction": 0.2, "no_eval_first": True, "max_steps": 4, "save_every": 2}
        train(small_config(files, output_dir="run", **settings))
    code, out, err = call(command, "--resume", "--output-dir", "run", "--eval-batch-size", 2)
    assert code == 0 and "steps 2 to 4" in out, err


def test_other_places_name_their_own_remedy(files, monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(MaskedLM, "to", out_of_memory)
        code, _, err = call(command, *small_flags(files), "--max-steps", 1)
    assert code == 2 and err.splitlines()[-1].startswith(
        "error: out of memory: use a smaller model"
    )
    monkeypatch.setattr(RobertaForMaskedLM, "forward", out_of_memory)
    code, _, err = call(infer, "--model", files / "model", "A <mask> galaxy.")
    assert code == 2 and "cpu is out of memory for this text: shorten it" in err
    model = load_model(files / "model")
    with pytest.raises(torch.OutOfMemoryError):  # not False
        sparse_head_works(MaskedLM(model))
    with pytest.raises(torch.OutOfMemoryError):
        ignores_padding(model, load_tokenizer(files / "model"))


def test_gradient_checkpointing_computes_the_layers_twice_and_changes_nothing(files, monkeypatch):
    """With dropout, whose masks are drawn again, on all positions with or without."""
    forward, calls = RobertaIntermediate.forward, []
    monkeypatch.setattr(
        RobertaIntermediate, "forward", lambda self, x: calls.append(1) or forward(self, x)
    )
    losses, counts = [], []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "max_steps": 5, "log_every": 1}
        settings["dense_head"] = True
        calls.clear()
        losses.append(read_metrics(train(small_config(files, **settings))))
        counts.append(len(calls))
    assert losses[0] == losses[1]
    assert counts[1] - counts[0] == 2 * 5  # a layer of two, in each step


def test_masked_positions_are_gathered_after_layers_that_are_computed_again(
    files_without_dropout,
):
    losses = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "max_steps": 5, "log_every": 1}
        run_dir = train(small_config(files_without_dropout, **settings))
        losses.append([line["loss"] for line in read_metrics(run_dir)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 5


def test_a_model_without_gradient_checkpointing_is_refused(files, monkeypatch):
    monkeypatch.setattr(RobertaForMaskedLM, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"--gradient-checkpointing: .*does not support"):
        train(small_config(files, gradient_checkpointing=True, max_steps=1))


RESTART = """
import os, sys
from mlm_scratch.speed.allocator import restart_without_thread_cache
print(os.getpid(), sys.argv[1:], flush=True)
restart_without_thread_cache()
print(os.environ["GLIBC_TUNABLES"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="only without a GPU")
def test_a_command_line_restarts_once_as_the_same_process(tmp_path):
    (tmp_path / "script.py").write_text(RESTART)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.perturb=0"}

    def lines(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.check_output(command, env=environment, text=True).splitlines()

    first, second, tunables = lines("-u", tmp_path / "script.py", "a b", "--c")
    assert first == second and first.endswith("['a b', '--c']")
    assert tunables == "glibc.malloc.perturb=0:glibc.malloc.tcache_count=0"
    assert len(lines("-c", RESTART, "a b")) == 2  # as in a notebook: it is not the command's

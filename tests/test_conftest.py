"""On a machine with a GPU, pretended here, only the tests marked `cuda` choose it."""

import os
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

# Python runs it first, in every process. Like CUDA, it reads the variable once.
SITECUSTOMIZE = """
import functools
import os

import torch


@functools.cache
def device_count():
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 1


torch.cuda.device_count = device_count
torch.cuda.is_available = lambda: device_count() > 0
"""

TESTS = """
import subprocess
import sys

import pytest
from transformers import FillMaskPipeline, TrainingArguments
from transformers.utils.import_utils import is_torch_cuda_available

from mlm_scratch.precision import choose_precision
from mlm_scratch.util.errors import UserError
from tests.support.processes import finish, torchrun
from tests.support.tiny import byte_level_tokenizer, roberta, small_flags


def chosen():
    try:
        return choose_precision("auto", "fp32").device.type
    except UserError as error:  # torch finds no GPU behind the pretence
        return str(error)[len("--device ") :][:4]


def seen_by_another_process():
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def shared():
    return chosen()


@pytest.mark.cuda
def test_marked(shared):
    assert chosen() == "cuda" and is_torch_cuda_available()
    assert seen_by_another_process() == "True\\n"
    assert shared == "cpu"


def test_unmarked(shared):
    assert chosen() == shared == "cpu" and not is_torch_cuda_available()
    assert seen_by_another_process() == "False\\n"


def test_originals():
    tokenizer = byte_level_tokenizer()
    assert FillMaskPipeline(roberta(tokenizer), tokenizer).device.type == "cpu"
    assert TrainingArguments("out").device.type == "cpu"


def test_torchrun(files):
    flags = [*small_flags(files), "--device", "auto", "--max-steps", 1, "--eval-fraction", 0]
    code, out, err = finish(torchrun(1, *flags))
    assert code == 0 and "on CPU, fp32" in out, err
"""


@pytest.mark.slow
def test_only_tests_marked_cuda_see_a_gpu(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "test_pretended.py").write_text(TESTS)
    shown = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "test_pretended.py"],
        cwd=tmp_path,
        env=shown | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "4 passed" in result.stdout, result.stdout

"""Which device and precision are chosen, and what is said where one cannot be used.

No GPU is needed: torch's answers are replaced by those that it gives on other machines.
"""

import shutil
import warnings

import pytest
import torch

from mlm_scratch.precision import Precision, choose_precision
from mlm_scratch.util.errors import UserError

ones = torch.ones


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU as far as torch.cuda says; its tensors are on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))


@pytest.fixture
def an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))


def test_auto_takes_the_gpu_and_bf16_where_it_has_it(a_gpu, monkeypatch):
    assert choose_precision("auto", "auto") == Precision(torch.device("cuda:0"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_precision("cuda", "auto") == Precision(torch.device("cuda:0"), torch.float16)


def test_a_gpu_that_torch_has_no_kernels_for_is_refused(a_gpu, monkeypatch):
    """Its memory can be used; only the first kernel fails."""

    def no_kernel(*shape, device):
        raise torch.AcceleratorError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel "
            "errors might be asynchronously reported"
        )

    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(UserError) as raised:
        choose_precision("auto", "auto")
    assert str(raised.value) == (
        "--device cuda:0 cannot be used: CUDA error: no kernel image is available for execution on "
        "the device"
    )


def test_a_gpu_that_cannot_be_selected_is_refused(a_gpu, monkeypatch):
    def busy(device):
        raise torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(UserError, match=r"--device cuda:0 cannot be used: .* devices are busy"):
        choose_precision("cuda", "auto")


@pytest.mark.parametrize(
    "built_for, reason",
    [
        (None, f"torch {torch.__version__} is built without CUDA"),
        ("13.0", "The NVIDIA driver on your system is too old (found version 11040)."),
    ],
)
def test_a_driver_without_a_gpu_for_torch_is_warned_about(monkeypatch, capsys, built_for, reason):
    def is_available():
        if built_for:
            warnings.warn(f"{reason}\nPlease update your GPU driver.", stacklevel=2)
        return False

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert choose_precision("auto", "auto").device.type == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: there is an NVIDIA driver, but torch finds no GPU")
    assert reason in line and line.endswith("using the CPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    choose_precision("auto", "auto")
    assert not capsys.readouterr().err


def test_without_an_apple_gpu_mps_is_refused_in_a_few_words():
    with pytest.raises(UserError) as raised:
        choose_precision("mps", "auto")
    assert str(raised.value) == "--device mps cannot be used: torch finds no Apple GPU"


def test_auto_takes_apples_gpu_in_fp32(an_apple_gpu, monkeypatch):
    precision = choose_precision("auto", "auto")
    assert precision == Precision(torch.device("mps"), torch.float32)
    assert str(precision) == "Apple GPU, fp32"
    with pytest.raises(UserError, match="--precision bf16: on an Apple GPU only fp32"):
        choose_precision("mps", "bf16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_precision("auto", "auto").device.type == "cpu"
    with pytest.raises(UserError, match="--device mps: several processes cannot share one GPU"):
        choose_precision("mps", "auto")


@pytest.mark.parametrize("device, inside", [("cuda", "high"), ("cpu", "highest")])
def test_tf32_ends_with_the_run(device, inside):
    with pytest.raises(KeyError), Precision(torch.device(device), torch.float32).tf32():
        assert torch.get_float32_matmul_precision() == inside
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
    with Precision(torch.device(device), torch.bfloat16).tf32():
        assert torch.get_float32_matmul_precision() == "highest"

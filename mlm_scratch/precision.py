"""Which device, which arithmetic: one code path for fp32, fp16 and bf16."""

import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlm_scratch.util.errors import UserError, first_line
from mlm_scratch.util.launch import Launch, this_launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ACCELERATORS = ("cuda", "mps")  # NVIDIA's (and AMD's) GPUs; Apple's


@dataclass(frozen=True)
class Precision:
    """A device, and the dtype of the matrix products on it. Weights stay fp32."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager:
        """Return the context of a forward pass: matrix products in half precision, none in fp32."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a scaler that scales the loss up, so that small fp16 gradients do not underflow.

        bf16 has the range of fp32 and needs none: a disabled scaler passes everything through.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    @contextmanager
    def tf32(self) -> Iterator[None]:
        """Multiply fp32 matrices in TF32 on a GPU: 10 bits of mantissa, 8 times the speed."""
        before = torch.get_float32_matmul_precision()
        if self.device.type == "cuda" and self.dtype == torch.float32:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)  # it is a setting of the whole process

    def rng_state(self) -> Tensor | None:
        """Return the state of the device's random generator; None on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.mps.get_rng_state() if self.device.type == "mps" else None

    def set_rng_state(self, state: Tensor) -> None:
        """Restore what `rng_state` returned on a device of the same type."""
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.mps.set_rng_state(state)

    def __str__(self) -> str:
        names = {"cpu": "CPU", "mps": "Apple GPU"}
        name = names.get(self.device.type) or torch.cuda.get_device_name(self.device)
        return f"{name}, {next(key for key, dtype in DTYPES.items() if dtype == self.dtype)}"


def choose_precision(device_name: str, precision: str) -> Precision:
    """Resolve "auto" for both. Each rank on a node has its own GPU.

    Raises:
        UserError: the device does not exist or cannot be used, or not in this precision.
    """
    device = _choose_device(device_name, this_launch())
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if has_bf16 else "fp16"
    if device.type == "mps" and precision != "fp32":
        raise UserError(f"--precision {precision}: on an Apple GPU only fp32 is supported")
    return Precision(device, DTYPES[precision])


def _choose_device(name: str, launch: Launch) -> torch.device:
    if name == "auto":
        name = _best_device(launch)
    if name == "cuda":
        name = f"cuda:{launch.local_rank}"
    elif launch.size > 1 and name.startswith(ACCELERATORS):
        raise UserError(f"--device {name}: several processes cannot share one GPU: use cuda or cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", *ACCELERATORS):
            raise RuntimeError(f"only cpu, {' and '.join(ACCELERATORS)} are supported")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("torch finds no Apple GPU")
        # A GPU that this torch has no kernels for still gives out memory, so run a kernel.
        (torch.ones(2, device=device) + 1).tolist()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the GPU that NCCL and new tensors use
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def _best_device(launch: Launch) -> str:
    """Return cuda, mps or cpu; warn where an NVIDIA driver is there but torch cannot use it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return "cuda"
    if torch.backends.mps.is_available() and launch.size == 1:
        return "mps"
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if has_driver and not is_hidden and launch.is_first:
        reasons = [first_line(str(warning.message)) for warning in caught]
        if torch.version.cuda is None:
            reasons = [f"torch {torch.__version__} is built without CUDA"]
        print(
            "warning: there is an NVIDIA driver, but torch finds no GPU "
            f"({'; '.join(reasons) or 'no reason given'}): using the CPU",
            file=sys.stderr,
        )
    return "cpu"

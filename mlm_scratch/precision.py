"""Which device, which arithmetic: one code path for fp32, fp16 and bf16."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from mlm_scratch.util.errors import UserError
from mlm_scratch.util.launch import this_launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{name}, {next(key for key, dtype in DTYPES.items() if dtype == self.dtype)}"


def choose_precision(device_name: str, precision: str) -> Precision:
    """Resolve "auto" for both. Each rank on a node has its own GPU.

    Raises:
        UserError: the device does not exist or cannot be used.
    """
    launch = this_launch()
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name == "cuda":
        device_name = f"cuda:{launch.local_rank}"
    elif launch.size > 1 and device_name.startswith("cuda"):
        raise UserError(f"--device {device_name}: several processes cannot share one GPU: use cuda")
    try:
        device = torch.device(device_name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device_name} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the GPU that NCCL and new tensors use
    if precision == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if has_bf16 else "fp16"
        else:
            precision = "fp32"
    return Precision(device, DTYPES[precision])

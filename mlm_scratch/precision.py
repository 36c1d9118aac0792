"""Which device, and in which arithmetic: one code path for fp32, fp16 and bf16."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from mlm_scratch.util.errors import UserError
from mlm_scratch.util.launch import this_launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Weights stay fp32; matrix products run in `dtype` where that is half precision."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass; does nothing in fp32."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss up before backward so that small fp16 gradients do not become 0.

        bf16 has the range of fp32 and needs none: a disabled scaler hands everything through.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{name}, {next(key for key, dtype in DTYPES.items() if dtype == self.dtype)}"


def choose_precision(device_name: str, precision: str) -> Precision:
    """Resolve "auto" for both. Of several processes on a machine each has a GPU of its own.

    Raises UserError for a device that is not there.
    """
    launch = this_launch()
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name == "cuda":
        device_name = f"cuda:{launch.local_rank}"
    elif launch.size > 1 and device_name.startswith("cuda"):
        raise UserError(f"--device {device_name}: several processes cannot share one GPU: say cuda")
    try:
        device = torch.device(device_name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda can")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device_name} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL and new tensors go
    if precision == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if has_bf16 else "fp16"
        else:
            precision = "fp32"
    return Precision(device, DTYPES[precision])

"""bf16 instead of fp32 on a CPU that multiplies in it, for models wide enough to gain.

A step of distilroberta takes 1 / 2.6 of the time with AVX512-BF16 (AMD EPYC), 1 / 1.85 with AMX. By
hidden size, with AVX512-BF16: 512 gains 2.1 to 2.4 x, 256 1.5 to 2.1 x, 128 1.1 to 1.7 x on one
machine and 0.8 x on another, where the casts cost more than the products gain (tests/README.md).
--precision fp32 switches it off.
"""

import torch

from mlm_scratch.model import MaskedLM
from mlm_scratch.speed.checks import bf16_works

UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}  # torch's names: the common ones
WIDE_ENOUGH = 256  # hidden size


def precision_on_cpu(model: MaskedLM) -> tuple[str, str]:
    """Choose "bf16" or "fp32" to train in on this CPU; return the choice and its reason.

    It follows from the processor and the model alone, never from a stopwatch, so that equal
    commands do equal things.
    """
    capabilities = torch.cpu.get_capabilities()
    unit = next((name for key, name in UNITS.items() if capabilities.get(key)), None)
    if unit is None:
        return "fp32", f"this CPU has neither {' nor '.join(UNITS.values())}"
    width = getattr(model.hf_model.config, "hidden_size", 0)
    if width < WIDE_ENOUGH:
        return "fp32", f"bf16 gains from a hidden size of {WIDE_ENOUGH}"
    if not bf16_works(model):
        return "fp32", "the model refuses bf16"
    return "bf16", f"{unit}, hidden size {width}"

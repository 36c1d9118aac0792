"""Which CPUs and models train in bf16."""

import pytest
import torch

from mlm_scratch.model import MaskedLM
from mlm_scratch.speed import bf16_on_cpu
from mlm_scratch.speed.bf16_on_cpu import WIDE_ENOUGH, precision_on_cpu
from mlm_scratch.speed.checks import bf16_works
from tests.support.tiny import byte_level_tokenizer, roberta

WIDE, NARROW = WIDE_ENOUGH, WIDE_ENOUGH - 64
BOTH = {"amx_bf16": True, "avx512_bf16": True}


@pytest.mark.parametrize(
    "capabilities, hidden_size, expected",
    [
        (BOTH, WIDE, ("bf16", f"AMX, hidden size {WIDE}")),
        (BOTH | {"amx_bf16": False}, WIDE, ("bf16", f"AVX512-BF16, hidden size {WIDE}")),
        (BOTH, NARROW, ("fp32", f"bf16 gains from a hidden size of {WIDE}")),
        ({"avx2": True}, WIDE, ("fp32", "this CPU has neither AMX nor AVX512-BF16")),
    ],
)
def test_wide_models_take_it_where_the_cpu_multiplies_in_it(
    monkeypatch, capabilities, hidden_size, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    model = MaskedLM(roberta(byte_level_tokenizer(), hidden_size=hidden_size))
    assert precision_on_cpu(model) == expected


def test_a_model_that_refuses_it_stays_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: BOTH)
    monkeypatch.setattr(bf16_on_cpu, "bf16_works", lambda model: False)
    model = MaskedLM(roberta(byte_level_tokenizer(), hidden_size=WIDE))
    assert precision_on_cpu(model) == ("fp32", "the model refuses bf16")


def test_a_model_that_refuses_bf16_is_detected():
    model = MaskedLM(roberta(byte_level_tokenizer()))
    assert bf16_works(model)

    def refuse(*_):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("not implemented for 'BFloat16'")

    model.hf_model.roberta.encoder.register_forward_pre_hook(refuse)
    assert not bf16_works(model)
    assert all(weight.grad is None for weight in model.parameters())

"""What a step costs, what a GPU could do, and where a run says how much of that it uses."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForMaskedLM, RobertaConfig

from mlm_scratch.model import MaskedLM
from mlm_scratch.precision import DTYPES, Precision
from mlm_scratch.run.build import prepare
from mlm_scratch.run.session import train
from mlm_scratch.speed import flops
from mlm_scratch.speed.flops import StepFlops, Utilization, peak_rate
from tests.support.tiny import small_config


@pytest.mark.parametrize(
    "name, precision, expected",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H200", "fp32", 495e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA L4", "fp32", 60e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165e12),
        ("NVIDIA H100 PCIe", "bf16", None),
        ("NVIDIA L40S", "bf16", None),
    ],
)
def test_data_sheets(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_rate(Precision(torch.device("cuda"), DTYPES[precision])) == expected
    assert peak_rate(Precision(torch.device("cpu"), DTYPES[precision])) is None


def test_flops_of_distilroberta_by_hand():
    config = RobertaConfig(vocab_size=50265, num_hidden_layers=6)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    encoder = 6 * (4 * 768**2 + 2 * 768 * 3072)
    expected = 1024 * (6 * encoder + 12 * 6 * 128 * 768) + 6 * 160 * (768**2 + 768 * 50265)
    masked_lm = MaskedLM(model)
    assert StepFlops(masked_lm).count(positions=1024, width=128, gathered=160) == expected
    masked_lm.gather_after(model.roberta.encoder.layer[5].attention.output.LayerNorm)
    expected -= 6 * (1024 - 160) * 2 * 768 * 3072
    assert StepFlops(masked_lm).count(positions=1024, width=128, gathered=160) == expected


def test_counting_draws_no_number_of_the_run(files):
    """Dropout would be another one, in the run and after each resume."""
    t = prepare(small_config(files))
    before = torch.get_rng_state()
    StepFlops(t.model)
    assert torch.equal(torch.get_rng_state(), before) and t.model.training


@pytest.mark.parametrize("settings", [{}, {"dense_head": True}, {"grouping": "lines"}])
def test_only_what_is_executed_counts(files, monkeypatch, settings):
    """Padding does, and the head on other positions than the masked ones if it is dense."""
    monkeypatch.setattr(flops, "peak_rate", lambda precision: 1e9)
    t = prepare(small_config(files, accumulate=2, **settings))
    step = next(t.loader.steps(0, 1))
    seconds = Utilization(t.model, t.precision).seconds_at_peak(step)
    counted = 0.0
    for batch in step.batches:
        rows, width = batch.input_ids.shape
        head = rows * width if settings.get("dense_head") else int((batch.labels != -100).sum())
        counted += StepFlops(t.model).count(rows * width, width, head)
    assert len(step.batches) == 2 and seconds == pytest.approx(counted / 1e9)


def test_a_run_tells_its_mfu_where_the_peak_is_known(files, monkeypatch, capsys):
    settings = {"max_steps": 6, "log_every": 2}
    for peak, is_known in ((1e12, True), (None, False)):
        monkeypatch.setattr(flops, "peak_rate", lambda precision, peak=peak: peak)
        run_dir = train(small_config(files, **settings))
        out, err = capsys.readouterr()
        assert ("tokens/s, MFU " in out) == ("tokens/s, MFU " in err) == is_known
        curves = EventAccumulator(str(run_dir / "logs")).Reload()
        assert ("train/mfu" in curves.Tags()["scalars"]) == is_known


def test_an_unusual_config_has_no_mfu(files, monkeypatch):
    def refuse(self, model):
        raise AttributeError("'Config' object has no attribute 'num_hidden_layers'")

    monkeypatch.setattr(flops, "peak_rate", lambda precision: 1e9)
    monkeypatch.setattr(StepFlops, "__init__", refuse)
    t = prepare(small_config(files))
    step = next(t.loader.steps(0, 1))
    assert Utilization(t.model, t.precision).seconds_at_peak(step) == 0

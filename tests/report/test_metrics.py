"""metrics.jsonl across a resume."""

import json
import math
from pathlib import Path

import pytest

from mlm_scratch.config import changed
from mlm_scratch.report.metrics import as_json, drop_later_lines, read_metrics
from mlm_scratch.run.session import train
from tests.support.tiny import small_config


def test_unreadable_metrics_are_dropped_with_a_warning(files, capsys):
    settings = small_config(files, output_dir="run", max_steps=15)
    train(settings)
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "garbage\n", *lines[4:]]))
    train(changed(settings, max_steps=18), resume=True)
    warning = "warning: metrics.jsonl: dropped from the first unreadable line on"
    assert warning in capsys.readouterr().err
    kept = path.read_text()
    assert kept.startswith("".join(lines[:3])) and "garbage" not in kept


def test_numbers_that_json_does_not_have_are_null_and_come_back(tmp_path):
    lines = [
        {"loss": math.nan, "grad_norm": math.inf},
        {
            **{"eval_loss": 800.0, "perplexity": math.inf, "eval_accuracy": 0.5},
            **{"eval_wiki_loss": 900.0, "eval_wiki_perplexity": math.inf},
        },
        {"watch": [{"text": "A <mask>.", "fill": "", "p": math.nan}]},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(as_json, lines)))

    def no_constants(name):
        pytest.fail(f"{name} is not JSON")

    for line in (tmp_path / "metrics.jsonl").open():
        json.loads(line, parse_constant=no_constants)
    lost, huge, watch = read_metrics(tmp_path)
    assert math.isnan(lost["loss"]) and math.isnan(lost["grad_norm"])
    assert huge == lines[1] and math.isnan(watch["watch"][0]["p"])


@pytest.mark.parametrize("evaluated, kept", [(10, 4), (5, 2)])
def test_an_evaluation_that_a_resume_repeats_is_dropped(tmp_path, evaluated, kept):
    """A signal cut it short after its line was written: the checkpoint does not know of it."""
    lines = [{"step": 5, "eval_loss": 2.0}, {"step": 10, "loss": 1.0}]
    lines += [{"step": 10, "eval_loss": 1.5}, {"step": 10, "watch": []}, {"step": 15, "loss": 0.5}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(as_json(line) + "\n" for line in lines))
    drop_later_lines(10, evaluated, path)
    assert len(path.read_text().splitlines()) == kept

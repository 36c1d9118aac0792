"""metrics.jsonl across a resume."""

from pathlib import Path

from mlm_scratch.config import changed
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

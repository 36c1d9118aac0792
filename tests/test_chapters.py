"""The chapters stand on their own feet: what they import, a copy of them, a run with them alone."""

import ast
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

import mlm_scratch
from mlm_scratch.data.documents import load_documents
from mlm_scratch.data.rows import prepare_rows
from mlm_scratch.loader import Collator, Loader
from mlm_scratch.loop import run_steps
from mlm_scratch.model import MaskedLM
from mlm_scratch.optim import build_optimizer, build_schedule, share_of_peak
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run.session import train
from tests.support.tiny import small_config

PACKAGE = Path(mlm_scratch.__path__[0])
CHAPTERS = ["masking", "loader", "model", "optim", "loop", "fill_mask"]


@pytest.mark.parametrize("number, name", enumerate(CHAPTERS), ids=CHAPTERS)
def test_a_chapter_imports_chapters_before_it_and_nothing_else_of_ours(number, name):
    """Annotations included. Relatively, so that a copy of the files is a package, too."""
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "transformers"}
    before = CHAPTERS[:number]
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module in before


COPIED = """
import sys
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from course.fill_mask import fill_mask
from course.loader import Collator, Loader, TokenRows
from course.loop import run_steps
from course.masking import corrupt
from course.model import MaskedLM
from course.optim import build_optimizer, build_schedule, share_of_peak


class EveryThird(Collator):
    def mask(self, input_ids, special, word_ids, rate):
        selected = (torch.arange(input_ids.shape[1]) % 3 == 0) & ~special
        masking = {"mask_token_id": self.mask_token_id, "vocab_size": self.vocab_size}
        seen = corrupt(input_ids, selected, **masking, generator=self.generator)
        return seen, torch.where(selected, input_ids, -100)


tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
hf_model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], dtype=torch.float32).train()
ids = tokenizer(open(sys.argv[2]).read().splitlines())["input_ids"]
rows = TokenRows(np.concatenate(ids), np.cumsum([0, *map(len, ids)]))
loader = Loader(rows, EveryThird(tokenizer), rows_per_step=8, batch_size=4)
optimizer = build_optimizer(hf_model, 1e-2, 0.0)
schedule = build_schedule(optimizer, partial(share_of_peak, total_steps=24))
scaler = torch.amp.GradScaler("cpu", enabled=False)
losses, positions = [], set()
for done in run_steps(loader.steps(0, 24), MaskedLM(hf_model), optimizer, schedule, scaler):
    losses.append(done.loss.item())
    for batch in done.step.batches:
        positions |= {int(i) % batch.labels.shape[1] for i in batch.positions}
assert sum(losses[-4:]) / 4 < losses[0] - 1, losses
assert {position % 3 for position in positions} == {0}
assert len(fill_mask(hf_model, tokenizer, "The Milky Way is a <mask> galaxy.")) == 5
try:
    import mlm_scratch
except ModuleNotFoundError:
    print("trained and filled")
"""


@pytest.mark.slow
def test_a_copy_of_the_six_files_trains_with_another_masking_and_fills(files, tmp_path):
    (tmp_path / "course").mkdir()
    (tmp_path / "course/__init__.py").touch()
    for name in CHAPTERS:
        shutil.copy(PACKAGE / f"{name}.py", tmp_path / "course")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", COPIED, files / "model", files / "a.txt"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "trained and filled\n", result.stderr


@pytest.mark.parametrize("dense_head", [True, False])
def test_a_run_by_the_chapters_alone_is_that_of_train_py(files, dense_head):
    """Every loss, norm and rate, and all final weights, bit for bit, with dropout.

    Which is drawn for the masked positions alone where only they are left: train.py finds the
    module that is named here.
    """
    settings = {"log_every": 1, "warmup_steps": 5, "weight_decay": 0.1}
    config = small_config(files, **settings, dense_head=dense_head)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    rows = prepare_rows(load_documents(config)[0], tokenizer, config)

    hf_model = AutoModelForMaskedLM.from_pretrained(config.model.name, dtype=torch.float32).train()
    model = MaskedLM(hf_model)
    model.dense_head = dense_head
    model.gather_after(hf_model.roberta.encoder.layer[-1].attention.output.LayerNorm)
    loader = Loader(rows, Collator(tokenizer), rows_per_step=8, batch_size=8)
    total_steps = 2 * loader.steps_per_epoch
    optimizer = build_optimizer(hf_model, config.optimization.lr, config.optimization.weight_decay)
    share = partial(share_of_peak, total_steps=total_steps, warmup_steps=5)
    schedule = build_schedule(optimizer, share)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    torch.manual_seed(42)  # dropout
    lines = [
        {
            "loss": done.loss.item(),
            "learning_rate": done.learning_rate,
            "grad_norm": done.grad_norm.item(),
        }
        for done in run_steps(loader.steps(0, total_steps), model, optimizer, schedule, scaler)
    ]

    run_dir = train(config)
    expected = [{name: line[name] for name in lines[0]} for line in read_metrics(run_dir)]
    assert lines == expected and len(lines) == total_steps
    state = hf_model.state_dict()
    for name, weight in load_file(run_dir / "model/model.safetensors").items():
        assert torch.equal(weight, state[name]), name

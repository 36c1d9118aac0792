"""README's loop on one page is a training loop: train.py's and Trainer's, bit for bit."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from mlm_scratch.config import resolve
from mlm_scratch.data.documents import load_documents
from mlm_scratch.data.rows import prepare_rows
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run.session import train
from tests.support.tiny import SENTENCES, save_roberta

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"```python\n(.*?)```", README, re.S)
NAMES = '"distilbert/distilroberta-base", "notes.txt"'
DTYPE = 'torch.float16 if device == "cuda" else torch.float32'


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with dropout for blocks of 128, and 300 documents: 16 steps, the last one short."""
    directory = tmp_path_factory.mktemp("files")
    torch.manual_seed(1)
    save_roberta(directory / "model", max_position_embeddings=130, hidden_dropout_prob=0.1)
    texts = [f"{i}: {SENTENCES[i % len(SENTENCES)]}" for i in range(300)]
    (directory / "notes.txt").write_text("\n".join(texts))
    return directory


def run_the_lesson(files, dtype):
    """Run the block with this model, text and arithmetic on the CPU; return all it defines."""
    assert BLOCK.count(NAMES) == BLOCK.count(DTYPE) == 1
    model, text = str(files / "model"), str(files / "notes.txt")
    names: dict = {}
    exec(BLOCK.replace(NAMES, f"{model!r}, {text!r}").replace(DTYPE, f"torch.{dtype}"), names)
    return names


def same_weights(weights, others):
    return all(torch.equal(weights[name], others[name]) for name in others)


@pytest.mark.parametrize(
    "precision, dtype",
    [("fp32", "float32"), pytest.param("fp16", "float16", marks=pytest.mark.slow)],
)
def test_the_loop_in_readme_is_that_of_train_py(files, precision, dtype):
    lesson = run_the_lesson(files, dtype)
    config = resolve(
        "tutorial",
        {
            "model": str(files / "model"),
            "train_file": (str(files / "notes.txt"),),
            "eval_fraction": 0.0,
            "dense_head": True,
            "device": "cpu",
            "precision": precision,
            "log_every": 1,
        },
    )
    run_dir = train(config)
    losses = [line["loss"] for line in read_metrics(run_dir)]
    assert len(losses) > 10 and lesson["losses"] == losses
    trained = load_file(run_dir / "model/model.safetensors")
    assert same_weights(lesson["model"].state_dict(), trained)
    assert same_weights(load_file("model/model.safetensors"), trained)
    if precision == "fp32":
        assert_trainer_agrees(config, lesson)


def assert_trainer_agrees(config, lesson):
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    rows = prepare_rows(load_documents(config)[0], tokenizer, config)
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(config.model.name, dtype=torch.float32),
        args=TrainingArguments(
            "trainer",
            num_train_epochs=2,
            learning_rate=2e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": rows.tokens[a:b].tolist()} for a, b in pairwise(rows.starts)],
        data_collator=DataCollatorForLanguageModeling(tokenizer, seed=42),
    )
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert lesson["losses"] == logged
    assert same_weights(lesson["model"].state_dict(), trainer.model.state_dict())


def test_it_fits_on_a_page_and_imports_the_masking_alone():
    assert re.findall(r"mlm_scratch\S*", BLOCK) == ["mlm_scratch.masking"]
    assert len(BLOCK.splitlines()) <= 50

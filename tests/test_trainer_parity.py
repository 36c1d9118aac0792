"""The loop follows transformers' Trainer, number by number."""

import json

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

from mlm_scratch.data import load_documents, prepare_rows
from mlm_scratch.loop import train
from mlm_scratch.recipes import resolve
from tests.tiny import SENTENCES, save_roberta


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model with dropout, so that random numbers drawn out of turn would show."""
    torch.manual_seed(1)
    return save_roberta(tmp_path_factory.mktemp("model"), hidden_dropout_prob=0.1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n".join(f"{i}: {text}" for i in range(8) for text in SENTENCES))
    return path


def ours(model_dir, text, **settings):
    config = resolve("tutorial", {
        "model": str(model_dir), "train_file": (str(text),), "eval_fraction": 0.0,
        "block_size": 16, "log_every": 3, "lr": 1e-3, **settings,
    })  # fmt: skip
    run_dir = train(config)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return config, list(lines), load_file(run_dir / "model" / "model.safetensors")


def trainers(config, output_dir):
    """The same run by the reference. Blocks as examples, seeded collator, dense head."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    rows = prepare_rows(load_documents(config)[0], tokenizer, config)
    examples = [{"input_ids": ids.tolist()} for ids in rows.tokens[: rows.starts[-1]].reshape(
        -1, config.block_size
    )]
    model = AutoModelForMaskedLM.from_pretrained(config.model, dtype=torch.float32)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir), seed=config.seed, num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size, learning_rate=config.lr,
            warmup_steps=config.warmup_steps, weight_decay=config.weight_decay,
            logging_steps=config.log_every, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=examples,
        data_collator=DataCollatorForLanguageModeling(tokenizer, seed=config.seed),
    )  # fmt: skip
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    model.save_pretrained(output_dir)
    return logs, load_file(output_dir / "model.safetensors")


@pytest.mark.parametrize("settings", [
    {}, {"warmup_steps": 5, "weight_decay": 0.1}, {"seed": 7, "batch_size": 5},
], ids=["plain", "warm-up and decay", "other seed and batch"])  # fmt: skip
def test_equal_to_trainer_bit_for_bit(tmp_path, model_dir, text, settings):
    """Every logged number and all final weights, over 2 epochs with a short last batch, on the
    CPU, with dropout."""
    config, lines, weights = ours(model_dir, text, dense_head=True, device="cpu", **settings)
    expected_lines, expected_weights = trainers(config, tmp_path)
    assert len(lines) >= 8
    for line, expected in zip(lines, expected_lines, strict=True):
        for name in ("step", "epoch", "loss", "learning_rate", "grad_norm"):
            assert line[name] == expected[name], (name, line, expected)
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name

"""Packed rows: the same step in fewer positions."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, ModernBertConfig

from mlm_scratch.config import changed
from mlm_scratch.loader import Batch
from mlm_scratch.parallel.ranks import ALONE
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run.build import adapt
from mlm_scratch.run.session import train
from mlm_scratch.speed.checks import first_position_if_packed
from mlm_scratch.speed.model import FastMaskedLM
from mlm_scratch.speed.packing import Layout, best_fit
from mlm_scratch.speed.shapes import positions_in_texts
from tests.support.processes import finish, forget_after, forked
from tests.support.tiny import (
    NO_DROPOUT,
    SENTENCES,
    bert_config,
    byte_level_tokenizer,
    roberta,
    save_files,
    small_config,
    write_text,
)
from tests.test_loop import lines_and_gradients

LINES = {"grouping": "lines", "block_size": 64, "log_every": 1, "max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without dropout, and 60 documents of one to five sentences."""
    directory = save_files(tmp_path_factory.mktemp("files"), **NO_DROPOUT)
    texts = [" ".join([str(i), *SENTENCES[i % 6 : i % 6 + 1 + i % 5]]) for i in range(60)]
    write_text(directory / "a.txt", texts)
    return directory


def test_rows_side_by_side_by_eye():
    input_ids = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0], [8, 9, 0, 0]])
    attention_mask = (input_ids > 0).long()
    labels = torch.where(input_ids % 3 == 1, input_ids, -100)
    batch = Batch(input_ids, attention_mask, labels, torch.empty(0))
    packed = Layout(9, packed=True)(batch)
    ids, texts, packed_labels, _ = (rows.tolist() for rows in packed)
    position_ids = positions_in_texts(packed.attention_mask).tolist()
    assert ids == [[3, 4, 5, 6], [1, 2, 8, 9], [7, 0, 0, 0]]
    assert texts == [[1, 1, 1, 1], [1, 1, 2, 2], [1, 0, 0, 0]]
    assert packed_labels == [[-100, 4, -100, -100], [1, -100, -100, -100], [7, -100, -100, -100]]
    assert position_ids == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 2]]
    aligned = Layout(9, packed=True, aligned=True)(batch)
    assert aligned[0].tolist() == [[3, 4, 5, 6, 1, 2, 8, 9], [7, 0, 0, 0, 0, 0, 0, 0]]


def test_every_text_has_its_place_and_rows_are_full():
    generator = random.Random(0)
    for _ in range(50):
        width = generator.randint(2, 64)
        lengths = [generator.randint(1, width) for _ in range(generator.randint(1, 90))]
        places = best_fit(lengths, width)
        taken = set()
        for (row, column, _), length in zip(places, lengths, strict=True):
            positions = {(row, column + i) for i in range(length)}
            assert column + length <= width and not positions & taken
            taken |= positions
        rows = max(row for row, _, _ in places) + 1
        assert rows <= max(1, 1.5 * sum(lengths) / width + 1)  # best fit decreasing: 11/9 of ideal
        numbers = [(row, number) for row, _, number in places]
        assert len(set(numbers)) == len(numbers) and min(number for _, number in numbers) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 16},
        {"batch_size": 4, "accumulate": 4},
        {"batch_size": 16, "whole_word": True},
        {"batch_size": 16, "dense_head": True},
    ],
    ids=["one batch", "accumulated", "whole words", "dense head"],
)
def test_a_packed_step_has_the_loss_and_the_gradients_of_a_padded_one(files, settings):
    config = small_config(files, **LINES, lr=1e-20, **settings)
    packed = lines_and_gradients(config)
    padded = lines_and_gradients(changed(config, no_packing=True))
    for (one, gradient), (other, expected) in zip(packed, padded, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_a_packed_run_ends_like_a_padded_one(files, capsys):
    """With two processes, with an evaluation, and with a resume that goes on the other way."""
    settings = LINES | {"batch_size": 8, "eval_fraction": 0.2, "lr": 1e-4, "save_every": 4}
    config = small_config(files, **settings, max_steps=8)
    expected = read_metrics(train(changed(config, no_packing=True)))
    assert "rows padded" in capsys.readouterr().out
    halves = train(changed(config, output_dir="run"))
    assert "rows packed" in capsys.readouterr().out
    forget_after(4, halves)
    train(changed(config, output_dir="run", no_packing=True), resume=True)
    two = changed(config, output_dir="two", batch_size=4)
    code, _, err = finish(forked(2, two))
    assert code == 0, err
    for run in (train(config), halves, Path("two")):
        for line, other in zip(read_metrics(run), expected, strict=True):
            rel = {"eval_accuracy": 0.05}
            for name, value in other.items():
                assert line[name] == pytest.approx(value, rel=rel.get(name, 1e-4)), name


def test_rows_as_long_as_a_model_takes_are_packed():
    """A BERT of 40 positions has none left to count from 1."""
    model = AutoModelForMaskedLM.from_config(bert_config())
    assert first_position_if_packed(FastMaskedLM(model), 40) == 0
    assert first_position_if_packed(FastMaskedLM(roberta(byte_level_tokenizer())), 64) == 2


def test_rows_longer_than_a_window_are_not_packed(files, capsys):
    """ModernBERT's local layers would take the mask in place of their window."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    model = AutoModelForMaskedLM.from_config(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            local_attention=32,
            max_position_embeddings=128,
        )
    )
    masked_lm = FastMaskedLM(model)
    firsts = [first_position_if_packed(masked_lm, length) for length in (8, 16, 40, 64)]
    assert firsts == [0, 0, None, None]  # a window reaches 16 tokens to each side
    config = small_config(files, **LINES)
    found = adapt(model, config, ALONE)
    assert not found.packs and not found.ready_mask
    assert adapt(model, changed(config, block_size=16), ALONE).packs

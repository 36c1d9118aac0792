"""The schedule and AdamW's parameter groups are those of transformers."""

import pytest
import torch
from torch.optim import SGD
from transformers import (
    AutoModelForMaskedLM,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from mlm_scratch.hf.small_modernbert import small_modernbert_config
from mlm_scratch.optim import build_optimizer, build_schedule, parameter_groups
from tests.support.tiny import byte_level_tokenizer, roberta

TOKENIZER = byte_level_tokenizer()
MODELS = {
    "RoBERTa": roberta(TOKENIZER),
    "ModernBERT": AutoModelForMaskedLM.from_config(small_modernbert_config(TOKENIZER)),
}


def rates(scheduler, steps):
    """The learning rates of the next steps."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def optimizer():
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)


@pytest.mark.parametrize("warmup, total", [(0, 7), (3, 7), (7, 7), (9, 7), (0, 1)])
def test_the_schedule_equals_transformers(warmup, total):
    """Also beyond the last step, and if it is built in the middle, as on a resume."""
    expected = rates(get_linear_schedule_with_warmup(optimizer(), warmup, total), total + 2)
    assert rates(build_schedule(optimizer(), warmup, total), total + 2) == expected
    for done in range(1, total):
        resumed = optimizer()
        resumed.param_groups[0]["initial_lr"] = 3e-4  # it comes with the optimizer's state
        assert (
            rates(build_schedule(resumed, warmup, total, done), total - done)
            == (expected[done:total])
        )


@pytest.mark.parametrize("name", MODELS)
def test_the_optimizer_equals_trainers(tmp_path, name):
    """Its groups, from get_decay_parameter_names, and all hyperparameters."""
    model = MODELS[name]
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=3e-4, weight_decay=0.1, use_cpu=True, report_to="none"
    )
    trainer = Trainer(model, arguments)
    expected, ours = trainer.create_optimizer(), build_optimizer(model, 3e-4, 0.1)
    assert type(ours) is type(expected)
    for own, theirs in zip(ours.param_groups, expected.param_groups, strict=True):
        assert own == theirs | {"params": own["params"]}
        assert list(map(id, own["params"])) == list(map(id, theirs["params"])) != []
    decayed = {id(parameter) for parameter in ours.param_groups[0]["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    expected_names = set(trainer.get_decay_parameter_names(model))  # tied weights by both names
    assert names == expected_names & dict(model.named_parameters()).keys()


def test_norms_of_every_kind_are_spared_as_in_trainer():
    """By their names, where the class is not LayerNorm."""
    names = ("norm", "q_norm", "RMSNorm1", "LayerNorm", "normal", "enorm2", "head")
    model = torch.nn.ModuleDict({name: torch.nn.RMSNorm(4) for name in names})
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.1)[0]["params"]}
    ours = [name for name, parameter in model.named_parameters() if id(parameter) in decayed]
    assert ours == Trainer.get_decay_parameter_names(None, model)
    assert ours == ["normal.weight", "enorm2.weight", "head.weight"]

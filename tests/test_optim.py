"""The schedules and AdamW's parameter groups are those of transformers."""

import pytest
import torch
from torch.optim import SGD
from transformers import (
    AutoModelForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    Trainer,
    TrainingArguments,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from mlm_scratch.config import OptimizationSettings, as_steps
from mlm_scratch.hf.small_modernbert import small_modernbert_config
from mlm_scratch.optim import build_optimizer, build_schedule, parameter_groups
from mlm_scratch.run.state import rate_schedule
from tests.support.tiny import byte_level_tokenizer, roberta

TOKENIZER = byte_level_tokenizer()
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY = LAYERS | {"hidden_size": 8, "vocab_size": 20, "pad_token_id": 1}
MODELS = {
    "RoBERTa": roberta(TOKENIZER),
    # Some of their LayerNorms have names that say nothing: only the class tells.
    "ESM": EsmForMaskedLM(EsmConfig(**TINY, mask_token_id=4)),
    "MegatronBERT": MegatronBertForMaskedLM(MegatronBertConfig(**TINY)),
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


REFERENCES = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(
        optimizer, warmup
    ),
    "wsd": lambda optimizer, warmup, total: get_wsd_schedule(optimizer, warmup, 3, total),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("warmup, total", [(0, 7), (3, 7), (5, 7), (7, 7), (9, 7), (0, 1)])
def test_the_schedules_equal_transformers(name, warmup, total):
    """Also if they are built in the middle, as on a resume."""
    decay = {"decay_steps": 3} if name == "wsd" else {}
    share = rate_schedule(OptimizationSettings(schedule=name, warmup_steps=warmup, **decay), total)
    expected = rates(REFERENCES[name](optimizer(), warmup, total), total)
    assert rates(build_schedule(optimizer(), share), total) == expected
    for done in range(1, total):
        resumed = optimizer()
        resumed.param_groups[0]["initial_lr"] = 3e-4  # it comes with the optimizer's state
        assert rates(build_schedule(resumed, share, done), total - done) == expected[done:total]


def test_steps_may_be_a_share_of_the_run(tmp_path):
    """Rounded up, as by TrainingArguments."""
    for value, total in ((0.06, 50), (0.06, 51), (0.5, 3), (0.0, 9), (1, 9), (4, 9)):
        arguments = TrainingArguments(str(tmp_path), warmup_steps=value, use_cpu=True)
        assert as_steps(value, total) == arguments.get_warmup_steps(total)
    in_steps, as_shares = (
        rate_schedule(
            OptimizationSettings(schedule="wsd", warmup_steps=warmup, decay_steps=decay), 50
        )
        for warmup, decay in ((3, 10), (0.06, 0.2))
    )
    assert [in_steps(step) for step in range(50)] == [as_shares(step) for step in range(50)]


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

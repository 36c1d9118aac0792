"""The answers to the exercises of the reading guide, one per file of the reading path."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import RobertaConfig, RobertaForMaskedLM

from mlm_scratch.config import changed, resolve
from mlm_scratch.evaluate import evaluate
from mlm_scratch.fill_mask import fill_mask
from mlm_scratch.loader import Batch, Collator, Loader, TokenRows, epoch_order
from mlm_scratch.loop import run_steps
from mlm_scratch.masking import IGNORE, corrupt, mask_tokens
from mlm_scratch.model import MaskedLM
from mlm_scratch.optim import parameter_groups
from mlm_scratch.run import build
from mlm_scratch.run.build import prepare
from tests.support.tiny import byte_level_tokenizer, roberta

TOKENIZER = byte_level_tokenizer()


def test_masking_what_share_of_all_tokens_the_model_sees_changed():
    """13.5 %: of the 15 %, 80 % are <mask>, 10 % random (which may be the original)."""
    ids = torch.randint(10, 50_000, (200, 512))  # (B, T)
    special = torch.zeros_like(ids)  # (B, T)
    seen, labels = mask_tokens(
        ids,
        special,
        mask_token_id=4,
        vocab_size=50_000,
        generator=torch.Generator().manual_seed(0),
    )
    assert (seen != ids).float().mean().item() == pytest.approx(0.15 * 0.9, abs=0.003)
    assert (labels != -100).float().mean().item() == pytest.approx(0.15, abs=0.003)


def test_loader_which_rows_the_sixth_step_has():
    """10 rows in batches of 4 make 3 steps: the sixth is the last of epoch 1, with 2 rows."""
    rows = TokenRows(np.arange(100, 120, dtype=np.uint16), np.arange(11) * 2)  # row i: 2 ids
    loader = Loader(rows, Collator(TOKENIZER), rows_per_step=4, batch_size=4)
    (step,) = loader.steps(5, 6)
    (batch,) = step.batches
    ids = torch.where(batch.labels == -100, batch.input_ids, batch.labels)  # (2, 2) unmasked
    expected = epoch_order(10, 42, epoch=1)[8:10]
    assert [(row[0] - 100) // 2 for row in ids.tolist()] == expected.tolist()


def test_model_how_much_arithmetic_the_head_on_masked_positions_saves():
    """distilroberta's shape, 8 x 128 tokens: 1.7 times less for the whole step."""
    with torch.device("meta"):  # shapes only: nothing is computed
        model = RobertaForMaskedLM(RobertaConfig(vocab_size=50_265, num_hidden_layers=6))
        masked_lm, input_ids = MaskedLM(model), torch.zeros(8, 128, dtype=torch.int64)  # (B, T)
        positions = torch.zeros(round(0.15 * 8 * 128), dtype=torch.int64)  # (N,)
    flops = {}
    for masked_lm.dense_head in (True, False):
        with FlopCounterMode(display=False) as counter:
            masked_lm(Batch(input_ids, None, input_ids, positions)).backward()
        flops[masked_lm.dense_head] = counter.get_total_flops()
    assert flops[True] / flops[False] == pytest.approx(1.7, abs=0.1)


def test_optim_which_parameters_weight_decay_spares():
    """Biases and the norms' scales: all that have one dimension, and nothing else."""
    groups = parameter_groups(roberta(TOKENIZER), weight_decay=0.1)
    dimensions = {g["weight_decay"]: {p.dim() for p in g["params"]} for g in groups}
    assert dimensions == {0.1: {2}, 0.0: {1}}


def test_loop_what_happens_if_the_gradients_are_clipped_before_they_are_unscaled():
    """They are 65,536 times too long, so all are clipped, and then unscaled to 1 / 65,536.
    (test_amp.py shows that the loop has the right order.)"""
    weight = torch.nn.Parameter(torch.ones(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=65_536.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(0.25 * weight.sum()).backward()  # true gradient norm 0.5: nothing to clip
    measured = torch.nn.utils.clip_grad_norm_([weight], max_norm=1.0)
    scaler.unscale_(optimizer)
    assert measured.item() == pytest.approx(0.5 * 65_536)
    assert weight.grad.norm().item() == pytest.approx(1 / 65_536)


def test_fill_mask_why_the_scores_of_all_targets_do_not_add_up_to_1():
    """They are probabilities over the whole vocabulary; divided by their sum, over the targets."""
    torch.manual_seed(0)
    model = roberta(TOKENIZER).eval()
    text, targets = "The Milky Way <mask> a galaxy.", [" is", " the"]
    scores = {
        fill["token"]: fill["score"] for fill in fill_mask(model, TOKENIZER, text, targets=targets)
    }
    assert sum(scores.values()) < 0.1
    with torch.no_grad():
        inputs = TOKENIZER(text, return_tensors="pt")
        at = inputs["input_ids"][0].tolist().index(TOKENIZER.mask_token_id)
        logits = model(**inputs).logits[0, at]  # (V,)
    among = logits[list(scores)].softmax(dim=0).tolist()  # (targets,)
    assert [score / sum(scores.values()) for score in scores.values()] == pytest.approx(among)


class RatePerRow(Collator):
    """Draws the share of tokens to mask from U(0, 1), anew for each row."""

    def mask(self, input_ids, special, word_ids, rate):
        """Select otherwise, and corrupt as always."""
        rates = torch.rand((len(input_ids), 1), generator=self.generator)  # (B, 1)
        drawn = torch.rand(input_ids.shape, generator=self.generator) < rates  # (B, T)
        selected = drawn & ~special  # (B, T)
        seen = corrupt(
            input_ids,
            selected,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            generator=self.generator,
        )
        return seen, torch.where(selected, input_ids, IGNORE)


@pytest.mark.slow
def test_generate_at_which_rates_a_model_trained_at_all_of_them_predicts_better(
    tmp_path, monkeypatch
):
    """Where nearly all is masked; where little is, the one trained at 25 % is better."""
    settings = {"max_steps": 150, "save_every": 0, "precision": "fp32", "device": "cpu"}
    losses = {}
    for name, collator in (("25 %", Collator), ("U(0, 1)", RatePerRow)):
        monkeypatch.setattr(build, "Collator", collator)
        config = resolve("bundled", settings | {"output_dir": str(tmp_path / name[:2])})
        t = prepare(config)
        for step in t.loader.steps(0, 150):
            next(run_steps([step], **t.step_arguments()))
        losses[name] = [
            evaluate(
                t.model,
                t.tokenizer,
                t.eval_rows[""],
                changed(config, eval_mlm_probability=rate),
                t.precision,
            )["eval_loss"]
            for rate in (0.1, 0.9)
        ]
    print(losses)
    assert losses["U(0, 1)"][1] < losses["25 %"][1] - 0.1
    assert losses["25 %"][0] < losses["U(0, 1)"][0]

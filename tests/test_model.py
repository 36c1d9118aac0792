"""The head on masked positions against the dense head, and what the loading refuses."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    IBertConfig,
    PerceiverConfig,
    PerceiverForMaskedLM,
)

from mlm_scratch.hf.checks import sparse_head_works
from mlm_scratch.hf.load import check_fit, load_model, load_tokenizer, longest_input
from mlm_scratch.hf.small_modernbert import small_modernbert, train_tokenizer
from mlm_scratch.model import MaskedLM, masked_lm_loss
from mlm_scratch.util.errors import UserError
from tests.support.tiny import (
    SENTENCES,
    byte_level_tokenizer,
    roberta,
    save_roberta,
    wordpiece_tokenizer,
)

BERT = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=40,
    pad_token_id=0,
)


def batch():
    """Rows of 9 and 6 tokens, padded; 5 masked positions."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 50, (2, 9), generator=generator)
    attention_mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    labels = torch.full((2, 9), -100)
    for row, column in ((0, 1), (0, 2), (0, 8), (1, 0), (1, 5)):
        labels[row, column] = 10 * row + column
    return input_ids, attention_mask, labels


def test_the_head_really_sees_masked_positions_only():
    model = AutoModelForMaskedLM.from_config(BERT)
    seen = []
    model.cls.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    masked_lm_loss(model, *batch())
    masked_lm_loss(model, *batch(), dense=True)
    assert seen == [(1, 5, 32), (2, 9, 32)]


def test_a_batch_without_masked_tokens_has_loss_0_and_a_gradient_of_0():
    model = AutoModelForMaskedLM.from_config(BERT)
    input_ids, attention_mask, labels = batch()
    labels.fill_(-100)
    loss_sum, n_masked = masked_lm_loss(model, input_ids, attention_mask, labels)
    assert loss_sum.item() == 0 and n_masked == 0
    loss_sum.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_model_is_left_without_a_hook():
    model = AutoModelForMaskedLM.from_config(BERT).eval()
    input_ids, attention_mask, labels = batch()
    before = model(input_ids=input_ids, attention_mask=attention_mask).logits
    masked_lm_loss(model, input_ids, attention_mask, labels)
    assert torch.equal(model(input_ids=input_ids, attention_mask=attention_mask).logits, before)
    assert not model.base_model._forward_hooks


def test_a_head_that_looks_around_is_found_out():
    class Neighbours(torch.nn.Module):
        def forward(self, logits):
            return logits + logits.roll(1, dims=1)

    model = AutoModelForMaskedLM.from_config(BERT)
    model.cls = torch.nn.Sequential(model.cls, Neighbours())
    assert not sparse_head_works(MaskedLM(model))


def test_the_sum_is_taken_in_fp32_under_autocast():
    model = AutoModelForMaskedLM.from_config(BERT).eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, _ = masked_lm_loss(model, *batch())
        input_ids, attention_mask, labels = batch()
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    assert loss_sum.dtype == torch.float32
    expected = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss_sum.item() == pytest.approx(expected.item(), rel=0.02)  # bf16 has 3 digits


def test_trained_tokenizer_takes_the_gap_before_a_mask_into_it():
    tokenizer = train_tokenizer(SENTENCES, vocab_size=320)
    ids = tokenizer("a <mask> galaxy")["input_ids"]
    assert ids == tokenizer("a<mask> galaxy")["input_ids"]
    assert (
        tokenizer.decode(tokenizer(SENTENCES[0])["input_ids"], skip_special_tokens=True)
        == (SENTENCES[0])
    )


def test_longest_input():
    tokenizer = byte_level_tokenizer()
    assert longest_input(tokenizer, roberta(tokenizer)) == 64  # 66 positions, counted from 2
    bert = AutoModelForMaskedLM.from_config(BERT)
    assert longest_input(wordpiece_tokenizer(), bert) == 40
    small = AutoModelForMaskedLM.from_config(small_modernbert(tokenizer))
    assert longest_input(tokenizer, small) == 512
    ibert = AutoModelForMaskedLM.from_config(
        IBertConfig(
            vocab_size=320,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=42,
        )
    )
    assert longest_input(tokenizer, ibert) == 40  # its tables of embeddings are of its own class


def test_loading_gives_back_what_was_saved_in_fp32(tmp_path):
    model = roberta(byte_level_tokenizer())
    model.half().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.float())
    scratch = load_model(tmp_path, init="scratch")
    embeddings = [m.get_input_embeddings().weight for m in (loaded, scratch)]
    assert embeddings[0].shape == embeddings[1].shape
    assert not torch.equal(*embeddings)


def no_head(directory):
    BertModel(BERT).save_pretrained(directory)


def no_weights(directory):
    BERT.save_pretrained(directory)


def not_a_masked_lm(directory):
    (directory / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50}')


def no_config(directory):
    (directory / "readme.txt").write_text("nothing here")


@pytest.mark.parametrize(
    "write, message",
    [
        (no_head, "no weights for cls"),
        (no_weights, "cannot load a model"),
        (not_a_masked_lm, "cannot load a model"),
        (no_config, "cannot load a model"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_what_is_wrong_with_a_tokenizer_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path / "nowhere")
    save_roberta(tmp_path)
    tokenizer, model = load_tokenizer(tmp_path), load_model(tmp_path)
    small = roberta(tokenizer, vocab_size=300)
    with pytest.raises(UserError, match="has 320 tokens, its model only 300 embeddings"):
        check_fit(tokenizer, small, "x")
    perceiver = PerceiverForMaskedLM(
        PerceiverConfig(
            vocab_size=320,
            d_model=8,
            num_latents=4,
            d_latents=8,
            num_self_attends_per_block=1,
            num_self_attention_heads=1,
            num_cross_attention_heads=1,
            max_position_embeddings=16,
        )
    )
    with pytest.raises(UserError, match="has no table of token embeddings"):
        check_fit(tokenizer, perceiver, "x")
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="has no mask token"):
        check_fit(tokenizer, model, "x")

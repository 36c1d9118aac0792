"""What a model can do, detected by running it, and whether it fits its tokenizer."""

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BigBirdConfig,
    IBertConfig,
    PerceiverConfig,
    PerceiverForMaskedLM,
)

from mlm_scratch.hf.checks import (
    check_fit,
    ignores_padding,
    longest_input,
    sparse_head_works,
    unused_parameters,
)
from mlm_scratch.hf.small_modernbert import small_modernbert_config
from mlm_scratch.model import MaskedLM
from mlm_scratch.util.errors import UserError
from tests.support.tiny import bert_config, byte_level_tokenizer, roberta, wordpiece_tokenizer

TOKENIZER = byte_level_tokenizer()


def test_a_head_that_mixes_positions_is_detected():
    class Neighbours(torch.nn.Module):
        def forward(self, logits):
            return logits + logits.roll(1, dims=1)

    model = AutoModelForMaskedLM.from_config(bert_config())
    model.cls = torch.nn.Sequential(model.cls, Neighbours())
    assert not sparse_head_works(MaskedLM(model))


def test_checks_leave_the_model_as_it_is():
    """A short row turns BigBird's sparse attention off for good."""
    config = BigBirdConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=70,
        pad_token_id=1,
    )
    model = AutoModelForMaskedLM.from_config(config)
    masked_lm = MaskedLM(model)
    assert sparse_head_works(masked_lm) and ignores_padding(model, TOKENIZER)
    unused_parameters(masked_lm)
    assert model.bert.attention_type == "block_sparse"
    model(input_ids=torch.arange(8)[None])
    assert model.bert.attention_type == "original_full"


def test_longest_input():
    assert longest_input(TOKENIZER, roberta(TOKENIZER)) == 64  # 66 positions, counted from 2
    bert = AutoModelForMaskedLM.from_config(bert_config())
    assert longest_input(wordpiece_tokenizer(), bert) == 40
    small = AutoModelForMaskedLM.from_config(small_modernbert_config(TOKENIZER))
    assert longest_input(TOKENIZER, small) == 512
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
    assert longest_input(TOKENIZER, ibert) == 40  # its embeddings are of a class of their own


def test_a_tokenizer_that_does_not_fit_its_model_is_reported():
    tokenizer = byte_level_tokenizer()
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
    model = roberta(tokenizer)
    check_fit(tokenizer, model, "x")
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="has no mask token"):
        check_fit(tokenizer, model, "x")

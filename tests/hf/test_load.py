"""What can be loaded, and what is reported where it cannot."""

import pytest
import torch
from transformers import BertModel

from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.util.errors import UserError
from tests.support.tiny import bert_config, byte_level_tokenizer, roberta


def test_loading_returns_what_was_saved_in_fp32(tmp_path):
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
    BertModel(bert_config()).save_pretrained(directory)


def no_weights(directory):
    bert_config().save_pretrained(directory)


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
def test_a_model_that_cannot_be_loaded_is_reported(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_a_tokenizer_that_cannot_be_loaded_is_reported(tmp_path):
    with pytest.raises(UserError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path / "nowhere")

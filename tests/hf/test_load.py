"""What can be loaded, and what is reported where it cannot."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraForPreTraining,
)

from mlm_scratch.config import resolve
from mlm_scratch.data.documents import load_documents
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.run.build import prepare
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from tests.support.tiny import (
    bert_config,
    byte_level_tokenizer,
    roberta,
    save_roberta,
    small_config,
)


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


def no_layer(directory):
    model = BertModel(bert_config(num_hidden_layers=1))
    model.config.num_hidden_layers = 2
    model.save_pretrained(directory)


def no_weights(directory):
    bert_config().save_pretrained(directory)


def not_a_masked_lm(directory):
    (directory / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50}')


def no_config(directory):
    (directory / "readme.txt").write_text("nothing here")


def in_a_folder_of_sentence_transformers(directory):
    save_roberta(directory / "0_Transformer")


@pytest.mark.parametrize(
    "write, message",
    [
        (no_head, "has no LM head .no weights for cls.* --init new-head"),
        (no_layer, "has no weights for bert.encoder.layer.1.* its encoder is not"),
        (no_weights, "cannot load a model"),
        (not_a_masked_lm, "cannot load a model"),
        (no_config, "cannot load a model"),
        (in_a_folder_of_sentence_transformers, "sentence-transformers: pass .*/0_Transformer$"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_reported(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_a_tokenizer_that_cannot_be_loaded_is_reported(tmp_path):
    with pytest.raises(UserError, match="it has no files of a tokenizer, such as"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("/no/such/directory", "there is no directory /no/such/directory$"),
        ("../mistyped", "there is no directory ../mistyped$"),
        ("runs/bundled/model", "there is no directory runs/bundled/model$"),
        ("mistyped", "no directory mistyped, the Hub does not answer, and no {} of that name is"),
        ("some/directory", "no directory some/directory, the Hub does not answer, and no {} of"),
    ],
)
def test_a_mistyped_name_is_no_directory(name, message):
    """Nor anything on the Hub: its clients' own messages speak of connections and ids."""
    for load in (load_tokenizer, load_model):
        with pytest.raises(UserError, match=message.format("model")):
            load(name)
    with pytest.raises(UserError, match=message.format("data set")):
        load_documents(resolve("tutorial", {"dataset": name}))
    Path("a_file").touch()
    with pytest.raises(UserError, match="a_file: it is a file: pass the directory"):
        load_model("a_file")


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = LAYERS | {"hidden_size": 32, "vocab_size": 320, "max_position_embeddings": 40}
ENCODERS = {
    "BERT's body, as sentence-transformers saves it": (BertModel, BertConfig(**SMALL)),
    "ELECTRA's discriminator": (
        ElectraForPreTraining,
        ElectraConfig(**SMALL, embedding_size=16),
    ),
    "DeBERTa-v2's body": (
        DebertaV2Model,
        DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_without_a_head_is_trained_with_a_new_one(files, capsys, name):
    kind, model_config = ENCODERS[name]
    saved = kind(model_config)
    saved.save_pretrained(files / "encoder")
    byte_level_tokenizer().save_pretrained(files / "encoder")
    settings = {"model": str(files / "encoder"), "max_steps": 1, "eval_fraction": 0.2}
    with pytest.raises(UserError, match="--init new-head"):
        prepare(small_config(files, **settings))

    t = prepare(small_config(files, init="new-head", **settings))
    assert "new-head" in (line := capsys.readouterr().out) and ", tied to the embeddings" in line
    encoder = t.hf_model.base_model
    expected = getattr(saved, saved.base_model_prefix, saved).state_dict()
    for weight, value in encoder.state_dict().items():
        assert torch.equal(value, expected[weight])
    output = t.hf_model.get_output_embeddings().weight
    assert output is t.hf_model.get_input_embeddings().weight
    again = prepare(small_config(files, init="new-head", **settings)).hf_model.state_dict()
    for weight, value in t.hf_model.state_dict().items():
        assert torch.equal(value, again[weight])  # by the seed of the run

    run_dir = train(small_config(files, init="new-head", **settings))
    load_model(run_dir / "model")  # complete now
    with pytest.raises(UserError, match="leave out --init new-head"):
        load_model(run_dir / "model", "new-head")

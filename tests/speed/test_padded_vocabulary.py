"""A padded vocabulary: nothing that is learnt or saved knows of it."""

import copy

import pytest
import torch
from transformers import AutoModelForMaskedLM

from mlm_scratch.hf.small_modernbert import small_modernbert_config
from mlm_scratch.model import MaskedLM
from mlm_scratch.optim import build_optimizer
from mlm_scratch.speed.padded_vocabulary import NEVER, PaddedVocabulary, pad_vocabulary
from tests.support.same import assert_same
from tests.support.tiny import NO_DROPOUT, batch_of, bert_config, byte_level_tokenizer, roberta

TOKENIZER = byte_level_tokenizer()


def model_of(padded):
    """A RoBERTa with 333 tokens, and what is known about its padding."""
    torch.manual_seed(0)
    model = MaskedLM(roberta(TOKENIZER, vocab_size=333, **NO_DROPOUT))
    return model, pad_vocabulary(model) if padded else PaddedVocabulary(333)


def no_bias():
    config = small_modernbert_config(TOKENIZER)
    config.update({"vocab_size": 333, "decoder_bias": False})
    return config


def train(model, vocabulary, steps, state=None):
    """Take steps with weight decay; return the losses and the optimizer."""
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1)
    if state is not None:
        vocabulary.load_optimizer_state(optimizer, copy.deepcopy(state))
    generator, losses = torch.Generator().manual_seed(1), []
    input_ids, labels = torch.randint(5, 333, (2, 4, 16), generator=generator)  # (B, T) each
    for _ in range(steps):
        loss = model(batch_of(input_ids, None, labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def test_it_learns_the_same_and_is_saved_without_the_padding():
    (plain, none), (padded, vocabulary) = model_of(False), model_of(True)
    assert [tuple(p.shape) for p in vocabulary.parameters] == [(384, 32), (384,)]
    one, plain_optimizer = train(plain, none, steps=20)
    other, optimizer = train(padded, vocabulary, steps=20)
    assert other == pytest.approx(one, rel=1e-4) and one[-1] < 0.9 * one[0]
    embeddings, bias = vocabulary.parameters
    assert not embeddings[333:].any() and (bias[333:] == NEVER).all()
    saved, expected = vocabulary.weights(padded), none.weights(plain)
    assert [x.shape for x in saved.values()] == [x.shape for x in expected.values()]
    tied = "hf_model.lm_head.decoder.weight", "hf_model.roberta.embeddings.word_embeddings.weight"
    assert saved[tied[0]] is saved[tied[1]]
    shapes = [
        {number: {name: x.shape for name, x in slot.items()} for number, slot in state.items()}
        for state in (vocabulary.optimizer_state(optimizer)["state"], plain_optimizer.state)
    ]
    assert shapes[0] == dict(enumerate(shapes[1].values()))


@pytest.mark.parametrize("begun, ended", [(False, True), (True, False), (True, True)])
def test_training_goes_on_with_or_without_it(begun, ended):
    model, vocabulary = model_of(begun)
    _, optimizer = train(model, vocabulary, steps=3)
    weights = {name: x.clone() for name, x in vocabulary.weights(model).items()}
    state = copy.deepcopy(vocabulary.optimizer_state(optimizer))
    whole, _ = train(model, vocabulary, 3, state)
    again, _ = model_of(False)
    again.load_state_dict(weights)
    vocabulary = pad_vocabulary(again) if ended else PaddedVocabulary(333)
    losses, _ = train(again, vocabulary, 3, state)
    assert losses == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        no_bias(),
        bert_config(vocab_size=64),
    ],
    ids=["without a bias", "a multiple of 64"],
)
def test_a_model_is_left_as_it_is_where_it_cannot_or_need_not(config):
    model = MaskedLM(AutoModelForMaskedLM.from_config(config))
    before = {name: (x.data_ptr(), x.clone()) for name, x in model.state_dict().items()}
    pad_vocabulary(model)
    after = {name: (x.data_ptr(), x) for name, x in model.state_dict().items()}
    assert [pointer for pointer, _ in before.values()] == [pointer for pointer, _ in after.values()]
    assert_same({k: x for k, (_, x) in before.items()}, {k: x for k, (_, x) in after.items()})

"""The bundled tokenizer."""

from mlm_scratch.hf.small_modernbert import train_tokenizer
from tests.support.tiny import SENTENCES


def test_a_mask_includes_the_space_before_it():
    tokenizer = train_tokenizer(SENTENCES, vocab_size=320)
    ids = tokenizer("a <mask> galaxy")["input_ids"]
    assert ids == tokenizer("a<mask> galaxy")["input_ids"]
    ids = tokenizer(SENTENCES[0])["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == SENTENCES[0]

"""Targets as people type them."""

import pytest

from mlm_scratch.hf.encode import spell_target
from tests.support.tiny import byte_level_tokenizer, wordpiece_tokenizer

TOKENIZER = byte_level_tokenizer()


@pytest.mark.parametrize(
    "tokenizer, target, before, spelled",
    [
        (TOKENIZER, "is", "", "is"),
        (TOKENIZER, "is", "A ", "Ġis"),
        (TOKENIZER, "is", "A (", "is"),
        (TOKENIZER, "is", "A <mask>", "is"),
        (TOKENIZER, " is", "", " is"),
        (TOKENIZER, "Ġis", "A ", "Ġis"),  # as the vocabulary has it
        (TOKENIZER, "offside", "A ", "Ġof"),  # no token: its first piece
        (TOKENIZER, "é", "A (", "Ã"),  # the vocabulary's é is a byte; the letter has two
        (TOKENIZER, "", "A ", ""),
        (wordpiece_tokenizer(), "Paris", "A ", "paris"),
        (wordpiece_tokenizer(), "##s", "A ", "##s"),
    ],
)
def test_a_target_is_spelled_to_follow_the_text_before(tokenizer, target, before, spelled):
    assert spell_target(tokenizer, target, before) == spelled

"""The sentences outside the corpus that train.py prints with their fills."""

from mlm_scratch.inference.unseen import unseen_lines


def test_sentences_whose_answers_are_not_tokens_are_left_out(files):
    """Hardly any answer is one of this vocabulary."""
    assert list(unseen_lines(files / "model")) == []

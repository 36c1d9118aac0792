"""The bundled corpus: tables of true facts, and the generator that phrases them."""

from mlm_scratch.data.corpus.generate import rows, unseen_prompts, unseen_sentences

__all__ = ["rows", "unseen_prompts", "unseen_sentences"]

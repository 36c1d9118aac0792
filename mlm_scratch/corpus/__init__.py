"""The bundled corpus: tables of true facts, and the generator that phrases them."""

from mlm_scratch.corpus.generate import rows

__all__ = ["rows"]

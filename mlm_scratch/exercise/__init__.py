"""Write it yourself: an exercise for each chapter, and what judges it."""

from mlm_scratch.exercise.judging import judge

__all__ = ["judge"]

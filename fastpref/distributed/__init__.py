"""Log-probs over several ranks, which split the vocabulary or the sequences."""

from fastpref.distributed.parts import sum_parts

__all__ = ["sum_parts"]

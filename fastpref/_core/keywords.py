"""The keyword arguments that public functions share, as types that their overloads use for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor


class ScoringKeywords(TypedDict, total=False):
    """Keywords of every function that scores labels."""

    ignore_index: int
    shift: bool
    temperature: float
    logit_scale: float
    softcap: float | None
    process_group: Any


class LogitsKeywords(ScoringKeywords, total=False):
    """Keywords of `token_logprobs`."""

    inplace_backward: bool


class LinearKeywords(ScoringKeywords, total=False):
    """Keywords of `linear_token_logprobs`."""

    mode: str
    chunk_rows: int | None
    filter_eps: float | None
    scored_rows: int | Sequence[int] | None


class _OfSequences(TypedDict, total=False):
    reduction: str
    cu_seqlens: Tensor | None
    ld_alpha: float | None
    shared_lengths: Tensor | None


class SequenceKeywords(LogitsKeywords, _OfSequences, total=False):
    """Keywords of `sequence_logprobs`."""


class LinearSequenceKeywords(LinearKeywords, _OfSequences, total=False):
    """Keywords of `linear_sequence_logprobs`."""

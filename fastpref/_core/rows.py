"""Determine how many rows of a batch are scored: the caller says it, or the host reads it from the device once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._core.autograd import has_values
from fastpref._core.checks import check_scored_rows
from fastpref._core.sequences import count_sequences, sequence_lengths
from fastpref_kernels import ops
from fastpref_kernels.contract import Scoring, boundaries_are_wrong, check_boundaries, check_labels, scored_targets


class ScoredRows(NamedTuple):
    """The number of scored rows, as far as the host knows it.

    Attributes:
        total: the number of rows to allocate, which is at least the number of scored rows; None if the host does not
            know it.
        of_sequences: the same for each sequence; None if the host does not know it.
        told: the number of rows to pass to operators, if labels have been checked, or if the host must not wait for a
            check. With None, the operators count the rows and check the labels.
    """

    total: int | None
    of_sequences: Sequence[int] | None
    told: int | None

    def room(self, scored: Tensor) -> int:
        """Return the number of rows to allocate: in a graph that does not know it, all positions of `scored`."""
        if self.total is not None:
            return min(self.total, scored.numel())
        return int(scored.count_nonzero()) if has_values(scored) else scored.numel()

    def by_sequence(self, scored: Tensor, cu_seqlens: Tensor | None, sequences: int) -> list[int]:
        """Return the number of rows of each sequence; the host waits for a device if it does not know them."""
        if self.of_sequences is not None:
            return list(self.of_sequences)
        if cu_seqlens is None and self.total == scored.numel():
            return [scored.shape[-1]] * sequences
        return sequence_lengths(scored, cu_seqlens, sequences).tolist()


UNKNOWN = ScoredRows(None, None, None)


def smaller(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    """Return the smaller of two sizes, without a read on the host."""
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def check_room(
    total: int, of_sequences: Sequence[int] | None, labels: Tensor, cu_seqlens: Tensor | None, scoring: Scoring
) -> None:
    """Raise `ValueError` if more labels are scored than the caller said. The host reads the labels.

    Args:
        total: the caller's number for the batch.
        of_sequences: the caller's number for each sequence, or None.
        labels: (B, T).
        cu_seqlens: None, or the packed boundaries (S+1,).
        scoring: which labels are scored.
    """
    _, scored = scored_targets(labels, cu_seqlens, ignore_index=scoring.ignore_index, shift=scoring.shift)
    found = sequence_lengths(scored, cu_seqlens, count_sequences(labels, cu_seqlens)).tolist()
    if sum(found) > total or any(have > room for have, room in zip(found, of_sequences or (), strict=False)):
        raise ValueError(
            f"scored_rows must be no fewer than the labels that are scored, {sum(found)}, by sequence {found}; "
            f"got {total if of_sequences is None else list(of_sequences)}"
        )


def resolve_rows(
    scored_rows: Any, labels: Tensor, cu_seqlens: Tensor | None, vocabulary: int | Tensor, scoring: Scoring
) -> ScoredRows:
    """Find the number of scored rows, and check labels on a device, in the only read of a training step.

    Args:
        scored_rows: None, an int for the batch, or a sequence of one int for each sequence.
        labels: (B, T).
        cu_seqlens: None, or the packed boundaries (S+1,).
        vocabulary: the number of columns; a tensor where the ranks of a group know it together.
        scoring: which labels are scored.

    Raises:
        TypeError: `scored_rows` is none of these.
        ValueError: `scored_rows` does not have one number for each sequence; on a CPU, it is below the number of scored
            labels; boundaries do not rise from 0 to the number of tokens.
        IndexError: a scored label is outside the vocabulary.
    """
    on_host = ops.on_host(labels)
    if scored_rows is None and (on_host or not has_values(labels)):
        return UNKNOWN
    sequences = count_sequences(labels, cu_seqlens)
    if scored_rows is not None:
        total, counts = check_scored_rows(scored_rows, sequences)
        if not on_host:
            return ScoredRows(total, counts, total)
        if not has_values(labels):
            return UNKNOWN  # a graph cannot check the number, and counting on a CPU is free
        assert total is not None
        check_room(total, counts, labels, cu_seqlens, scoring)
        return ScoredRows(total, counts, None)
    targets, scored = scored_targets(labels, cu_seqlens, ignore_index=scoring.ignore_index, shift=scoring.shift)
    wrong = (scored & ((targets < 0) | (targets >= vocabulary))).any()
    if cu_seqlens is not None:
        wrong = wrong | boundaries_are_wrong(cu_seqlens, labels.shape[1])
    lengths = sequence_lengths(scored, cu_seqlens, sequences)
    failed, *counts = torch.cat([wrong[None].to(lengths.dtype), lengths]).tolist()
    if failed:
        if cu_seqlens is not None:
            check_boundaries(cu_seqlens, labels.shape[1])
        check_labels(targets, scored, int(vocabulary))
    return ScoredRows(sum(counts), counts, sum(counts))

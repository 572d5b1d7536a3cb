"""How many rows of a batch are scored: known to the caller, or read from the device once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._checks import check_boundaries, check_labels, check_scored_rows
from fastpref._function import has_values
from fastpref._sharding import Shard
from fastpref.reference.linear_logprobs import check_room
from fastpref.reference.logprobs import count_sequences, scored_targets, sequence_lengths
from fastpref_kernels import ops


class ScoredRows(NamedTuple):
    """What the host knows of the number of scored rows.

    Attributes:
        total: the number of rows to make room for, no fewer than are scored; None where the host does not know it.
        of_sequences: the same for each sequence; None where the host does not know it.
        told: the number that operators are told where labels have been checked, or where no host may wait for a check;
            None makes them count, and check the labels.
    """

    total: int | None
    of_sequences: Sequence[int] | None
    told: int | None

    def room(self, scored: Tensor) -> int:
        """Return the number of rows to make room for; all positions of `scored` where a graph does not know it."""
        if self.total is not None:
            return min(self.total, scored.numel())
        return int(scored.count_nonzero()) if has_values(scored) else scored.numel()

    def by_sequence(self, scored: Tensor, cu_seqlens: Tensor | None, sequences: int) -> list[int]:
        """Return the number of rows of each sequence, which the host waits for unless it knows it."""
        if self.of_sequences is not None:
            return list(self.of_sequences)
        if cu_seqlens is None and self.total == scored.numel():
            return [scored.shape[-1]] * sequences
        return sequence_lengths(scored, cu_seqlens, sequences).tolist()


UNKNOWN = ScoredRows(None, None, None)


def count_columns(weight: Tensor, shard: Shard | None) -> int | Tensor:
    """Return the size of the whole vocabulary; a tensor where the ranks of a group know it together."""
    return weight.shape[0] if shard is None else shard.bounds[1]


def smaller(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    """Return the smaller of two sizes, without reading one on the host."""
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def resolve_rows(
    scored_rows: Any, labels: Tensor, cu_seqlens: Tensor | None, vocabulary: int | Tensor, ignore_index: int,
    shift: bool,
) -> ScoredRows:  # fmt: skip
    """Find the number of scored rows, and check the labels of a device, in the one read that a step has.

    Args:
        scored_rows: None, an int for the batch, or a sequence of one int for each sequence.
        labels: (B, T), or (T,).
        cu_seqlens: None, or the packed boundaries (S+1,).
        vocabulary: the number of columns; a tensor where the ranks of a group know it together.
        ignore_index: the label that is not scored.
        shift: whether position t is scored against label t+1.

    Raises:
        TypeError: `scored_rows` is neither.
        ValueError: `scored_rows` has not one number for each sequence, or on a CPU fewer than are scored; boundaries do
            not rise from 0 to the number of tokens.
        IndexError: a scored label outside of the vocabulary.
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
            return UNKNOWN  # a graph cannot check the number, and a host loses nothing by counting
        check_room(scored_rows, labels, cu_seqlens, ignore_index, shift)
        return ScoredRows(total, counts, None)
    rows = labels[None] if labels.dim() == 1 else labels
    targets, scored = scored_targets(rows, cu_seqlens, ignore_index=ignore_index, shift=shift)
    wrong = (scored & ((targets < 0) | (targets >= vocabulary))).any()
    if cu_seqlens is not None:
        wrong = wrong | ops.boundaries_are_wrong(cu_seqlens, rows.shape[1])
    lengths = sequence_lengths(scored, cu_seqlens, sequences)
    failed, *counts = torch.cat([wrong[None].to(lengths.dtype), lengths]).tolist()
    if failed:
        if cu_seqlens is not None:
            check_boundaries(cu_seqlens, rows.shape[1])
        check_labels(targets, scored, int(vocabulary))
    return ScoredRows(sum(counts), counts, sum(counts))

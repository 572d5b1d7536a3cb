"""Find the scored rows of a batch without a read on the host, and gather, scatter and rescale rows.

A GPU runs behind the host, which waits whenever it reads a value. It needs one of them, the number of scored rows, to
make room. So a caller that knows the number, or a number that is no smaller, gives it. Rows that are then left over are
at no position: they are zeros, and nothing of theirs goes anywhere. Where more rows are scored than there is room for,
boundaries do not rise from 0 to the number of tokens, or a label is outside of the vocabulary, nobody is there to raise
an error: the log-probs are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref_kernels import eager
from fastpref_kernels.linear.backend import COLUMNS, widened

# Labels of a shard, besides its columns: -1 is in a shard before, and the number of columns or more in one after.
UNSCORED = -2  # ignore_index
INVALID = -3  # in no shard


class Rows(NamedTuple):
    """The rows of a batch that are scored, in the order of their positions.

    Attributes:
        scored: (B, T') bool, whether a position is scored.
        of_position: (B·T',) int64, the row of each position that is scored.
        place: (n,) int64, the position of each row among B·T'; B·T' or more for a row that is left over.
        source: (n,) int64, the row of hidden states among B·T that it is; B·T for a row that is left over.
        label: (n,) int64.
        number: () int64, how many positions are scored, which may be more than there is room for.
    """

    scored: Tensor
    of_position: Tensor
    place: Tensor
    source: Tensor
    label: Tensor
    number: Tensor

    @classmethod
    def of(cls, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool, count: int | None) -> Rows:
        """Find the scored rows.

        Args:
            labels: (B, T).
            cu_seqlens: None, or the packed boundaries (S+1,).
            ignore_index: the label that is not scored.
            shift: whether position t is scored against label t+1.
            count: the number of rows to make room for. None: the host reads how many there are, once.
        """
        targets, scored = eager.scored_targets(labels, cu_seqlens, ignore_index, shift)
        positions = scored.numel()
        count = int(scored.count_nonzero()) if count is None else min(count, positions)
        ranks = scored.flatten().cumsum(0)
        place = torch.searchsorted(ranks, torch.arange(1, count + 1, device=labels.device))
        found = place < positions
        label = targets.flatten()[place.clamp(max=positions - 1)].long()
        width, length = max(targets.shape[1], 1), labels.shape[1]
        return cls(
            scored, (ranks - 1).clamp(0, max(count - 1, 0)), place,
            place + torch.div(place, width, rounding_mode="floor") * (length - targets.shape[1]),
            torch.where(found, label, UNSCORED), ranks[-1] if positions else ranks.sum(),
        )  # fmt: skip

    def __len__(self) -> int:
        return self.label.shape[0]

    def invalid(self, cu_seqlens: Tensor | None, tokens: int, vocabulary: int | None) -> Tensor:
        """Return which rows (n,) cannot be scored: nobody has checked labels, boundaries and the room for rows.

        Args:
            cu_seqlens: None, or the packed boundaries (S+1,).
            tokens: T, which boundaries must end at.
            vocabulary: the number of columns; None for the labels of a shard.
        """
        label = self.label
        outside = label == INVALID if vocabulary is None else (label < 0) | (label >= vocabulary)
        wrong = (outside & (self.place < self.scored.numel())) | (self.number > len(self))
        if cu_seqlens is not None:
            wrong = wrong | eager.boundaries_are_wrong(cu_seqlens, tokens)
        return wrong

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return values of rows (..., n) at their positions, (..., B, T'), in a dtype; 0 where nothing is scored."""
        shape = (*values.shape[:-1], *self.scored.shape)
        if not len(self):
            out = values.new_zeros(shape, dtype=dtype)
            return out if dtype == torch.bool else out.masked_fill_(self.scored, torch.nan)
        at_positions = values.to(dtype).index_select(-1, self.of_position).view(shape)
        return at_positions.masked_fill_(~self.scored, 0)

    def left_over(self, part: slice) -> Tensor:
        """Return which rows of a run are at no position, (R,) bool."""
        return self.place[part] >= self.scored.numel()

    def take(self, values: Tensor, part: slice, left_over: float = 0.0) -> Tensor:
        """Return values at positions (..., B, T') of a run of rows, (..., R), and a number for rows left over."""
        positions = self.scored.numel()
        place = self.place[part]
        rows = values.reshape(*values.shape[:-2], positions).index_select(-1, place.clamp(max=positions - 1))
        return rows.masked_fill_(self.left_over(part), left_over)


def dot(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the dot product of each row of x (R, H) and row labels[r] of weight (V, H), (R,), in float32 at least."""
    dtype = widened(x.dtype)
    return (x.to(dtype) * weight[labels].to(dtype)).sum(-1)


def gather(x: Tensor, source: Tensor, scale: Tensor | None) -> Tensor:
    """Return rows `source` (R,) of x (M, H), times `scale` (R,) if it is given; 0 where there is no such row."""
    rows = x.index_select(0, source.clamp(max=max(len(x) - 1, 0)))
    rows.masked_fill_((source >= len(x))[:, None], 0.0)
    return rows if scale is None else (rows.to(scale.dtype) * scale[:, None]).to(x.dtype)


def scatter(out: Tensor, source: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    """Add rows (R, H), times `scale` (R,) if it is given, to rows `source` (R,) of out (M, H), if there are such."""
    if not len(out):
        return
    values = rows if scale is None else rows * scale[:, None]
    values = values.masked_fill((source >= len(out))[:, None], 0.0)
    out.index_add_(0, source.clamp(max=len(out) - 1), values.to(out.dtype))


def rescale(kept: Tensor, factors: Tensor, columns: int) -> None:
    """Multiply every piece of `columns` columns of kept exponentials (R, V) by its factor (pieces, R).

    Few rows have a factor other than 1, and nothing else is touched. Which they are is read on the host: a kernel
    leaves where it is 1.
    """
    pieces = max(COLUMNS // columns, 1)
    for first in range(0, len(factors), pieces):
        part = factors[first : first + pieces]
        rows = (part != 1).any(0).nonzero()[:, 0]
        if not len(rows):
            continue
        begin, end = first * columns, min((first + len(part)) * columns, kept.shape[1])
        wide = widened(kept.dtype)
        factor = part[:, rows].to(wide).t()[..., None].expand(-1, -1, columns).reshape(len(rows), -1)
        kept[rows, begin:end] = kept[rows, begin:end].mul_(factor[:, : end - begin])

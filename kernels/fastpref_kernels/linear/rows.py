"""Find the scored rows of a batch without a read on the host.

A GPU runs behind the host, which waits whenever it reads a value. The host needs one value, the number of scored rows,
to allocate memory. So a caller that knows this number, or an upper bound, passes it. If the bound is too large, some
rows are left over. They belong to no position, are zeros, and affect no result. An error would need a read: if more
rows are scored than were allocated, boundaries do not rise from 0 to the number of tokens, or a label is outside the
vocabulary, the log-probs are NaN instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.contract import INVALID, UNSCORED, boundaries_are_wrong, scored_targets


class Rows(NamedTuple):
    """The rows of a batch that are scored, in the order of their positions.

    Attributes:
        scored: (B, T') bool, whether a position is scored.
        of_position: (B·T',) int64, the row of each position that is scored.
        place: (n,) int64, the position of each row among B·T'; B·T' or more for a row that is left over.
        source: (n,) int64, the index of the row's hidden states among B·T; B·T for a row that is left over.
        label: (n,) int64.
        number: () int64, how many positions are scored, which may be more than were allocated.
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
            count: the number of rows to allocate. None: the host reads how many are scored, once.
        """
        targets, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
        positions = scored.numel()
        count = int(scored.count_nonzero()) if count is None else min(count, positions)
        ranks = scored.flatten().cumsum(0)
        place = torch.searchsorted(ranks, torch.arange(1, count + 1, device=labels.device))
        found = place < positions
        label = targets.flatten()[place.clamp(max=positions - 1)].long()
        width, length = max(targets.shape[1], 1), labels.shape[1]
        return cls(
            scored=scored,
            of_position=(ranks - 1).clamp(0, max(count - 1, 0)),
            place=place,
            source=place + torch.div(place, width, rounding_mode="floor") * (length - targets.shape[1]),
            label=torch.where(found, label, UNSCORED),
            number=ranks[-1] if positions else ranks.sum(),
        )

    def __len__(self) -> int:
        return self.label.shape[0]

    def invalid(self, cu_seqlens: Tensor | None, tokens: int, vocabulary: int | None) -> Tensor:
        """Return which rows (n,) cannot be scored, if labels, boundaries and the number of rows have not been checked.

        Args:
            cu_seqlens: None, or the packed boundaries (S+1,).
            tokens: T, which boundaries must end at.
            vocabulary: the number of columns; None for the labels of a shard.
        """
        label = self.label
        outside = label == INVALID if vocabulary is None else (label < 0) | (label >= vocabulary)
        wrong = (outside & (self.place < self.scored.numel())) | (self.number > len(self))
        if cu_seqlens is not None:
            wrong = wrong | boundaries_are_wrong(cu_seqlens, tokens)
        return wrong

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Put values of rows (..., n) at their positions, (..., B, T'), in a dtype, with 0 where nothing is scored."""
        shape = (*values.shape[:-1], *self.scored.shape)
        if not len(self):
            out = values.new_zeros(shape, dtype=dtype)
            return out if dtype == torch.bool else out.masked_fill_(self.scored, torch.nan)
        at_positions = values.to(dtype).index_select(-1, self.of_position).view(shape)
        return at_positions.masked_fill_(~self.scored, 0)

    def left_over(self, part: slice) -> Tensor:
        """Return which rows of a run are left over, (R,) bool."""
        return self.place[part] >= self.scored.numel()

    def take(self, values: Tensor, part: slice, left_over: float = 0.0) -> Tensor:
        """Take the values (..., R) of a run of rows from positions (..., B, T'); rows left over get `left_over`."""
        positions = self.scored.numel()
        place = self.place[part]
        rows = values.reshape(*values.shape[:-2], positions).index_select(-1, place.clamp(max=positions - 1))
        return rows.masked_fill_(self.left_over(part), left_over)

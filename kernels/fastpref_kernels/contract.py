"""The contract of both packages: statistics, the transform of logits, scored positions, value checks and results.

Each of these facts is stated only here. To add a statistic, add its member to `Statistic` and a branch to each device's
kernels. The schemas, the fakes, the C++ constants and the public names follow from the member.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The number of columns in each block that a filter keeps or drops in a gradient from hidden states. A CPU's products
# are at full speed from 1024 columns on, and a row of this many stays in an L1 cache.
COLUMNS = 4096
# A row moves its anchor when its sum of exponentials exceeds this limit. The limit is lower with an entropy, whose
# accuracy needs an anchor near the row's mass, not only a sum in range.
LIMIT, ENTROPY_LIMIT = 2.0**60, 2.0**10


def widened(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that operands of these dtypes are computed in: their common dtype, float32 at least."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


class Statistic(enum.IntFlag):
    """A per-token statistic that the pass over the logits can also compute.

    A member's value is its bit in an operator's `stats`, and its name in lower case is its public name. Operators
    return one tensor for every statistic, in the order of the bits, and an empty one where it was not asked for.
    """

    LSE = 1
    ENTROPY = 2
    MEAN_LOGITS = 4
    IS_TOP1 = 8
    LOG_SUM_SQ_PROBS = 16
    TOP2_MARGIN = 32
    DROPPED_MASS = 64  # only from hidden states, where `filter_eps` drops parts of the gradient


# A gradient flows through this one, and through the log-probs.
DIFFERENTIABLE = Statistic.ENTROPY
# This one is bool. All others have the dtype of the log-probs.
BOOLEAN = Statistic.IS_TOP1
LINEAR_STATISTICS: dict[str, Statistic] = {str(member.name).lower(): member for member in Statistic}
STATISTICS: dict[str, Statistic] = {
    name: member for name, member in LINEAR_STATISTICS.items() if member is not Statistic.DROPPED_MASS
}

# The place of each statistic among those that an operator returns. Bits are tested as plain ints, which takes a tenth
# of the time that the members of an enum take.
PLACE: dict[Statistic, int] = {member: place for place, member in enumerate(Statistic)}
_DIFFERENTIABLE_PLACE = PLACE[DIFFERENTIABLE]


def statistic_dtype(statistic: Statistic, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a statistic beside log-probs of `dtype`."""
    return torch.bool if statistic is BOOLEAN else dtype


def empty_statistics(
    like: Tensor, statistics: dict[str, Statistic], stats: int, shape: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """Return uninitialized memory for every statistic, (0,) for one that is not asked for.

    Args:
        like: a tensor on the device.
        statistics: `STATISTICS` or `LINEAR_STATISTICS`.
        stats: the bits of the statistics that are asked for.
        shape: (B, T').
        dtype: the dtype of the log-probs.
    """
    return [
        like.new_empty(tuple(shape) if stats >> place & 1 else (0,), dtype=statistic_dtype(member, dtype))
        for place, member in enumerate(statistics.values())
    ]


def constant_statistics(statistics: Sequence[Tensor], stats: int) -> list[Tensor]:
    """Return the statistics of an operator that no gradient flows through."""
    if not stats >> _DIFFERENTIABLE_PLACE & 1:
        return list(statistics)
    return [values for place, values in enumerate(statistics) if place != _DIFFERENTIABLE_PLACE]


def statistic_gradient(grads: Sequence[Tensor | None], stats: int) -> Tensor | None:
    """Return the gradient of the differentiable statistic, or None if the statistic is not asked for.

    A compiled graph hands a zero gradient even to a statistic that was never asked for.
    """
    return grads[_DIFFERENTIABLE_PLACE] if stats >> _DIFFERENTIABLE_PLACE & 1 else None


class LogprobsResult(NamedTuple):
    """The result of `fastpref::logprobs`.

    Attributes:
        logps: (B, T').
        sequences: (S,) sums or means of them; (0,) with reduction "none".
        norm: (3 or 4, B, T'), what the backward needs: a and 1/S of softmax_j = exp(rate·(u_j − a))/S, the log-prob,
            and the entropy if it is asked for.
        counts: (S,) int32, the scored tokens of each sequence; (0,) with reduction "none".
        statistics: one tensor for every member of `STATISTICS`.
    """

    logps: Tensor
    sequences: Tensor
    norm: Tensor
    counts: Tensor
    statistics: tuple[Tensor, ...]

    @classmethod
    def of(cls, outputs: Sequence[Tensor]) -> LogprobsResult:
        """Return the operator's outputs by name."""
        logps, sequences, norm, counts, *statistics = outputs
        return cls(logps, sequences, norm, counts, tuple(statistics))

    def statistic(self, member: Statistic) -> Tensor:
        """Return one statistic."""
        return self.statistics[PLACE[member]]


class LinearResult(NamedTuple):
    """The result of `fastpref::linear_logprobs` and `fastpref::linear_finalize`.

    Attributes:
        logps: (B, T').
        norm: (3 or 4, B, T'): a and 1/S of softmax_j = exp(z_j − a)/S, the log-prob, and the entropy if it is asked
            for.
        shares: (chunks, B, T'), the softmax mass of every `COLUMNS` columns; chunks is 0 without `filter_eps`.
        statistics: one tensor for every member of `LINEAR_STATISTICS`.
    """

    logps: Tensor
    norm: Tensor
    shares: Tensor
    statistics: tuple[Tensor, ...]

    @classmethod
    def of(cls, outputs: Sequence[Tensor]) -> LinearResult:
        """Return the operator's outputs by name."""
        logps, norm, shares, *statistics = outputs
        return cls(logps, norm, shares, tuple(statistics))

    def statistic(self, member: Statistic) -> Tensor:
        """Return one statistic."""
        return self.statistics[PLACE[member]]


class RowSums(NamedTuple):
    """Each row's sums over the columns folded so far: the planes of a (9, R) or (9, B, T') float64 tensor.

    d_j = z_j − anchor, and y is the label.

    Attributes:
        anchor: the anchor; −inf as long as all logits are −inf, because such a row has no anchor.
        rest: Σ_{j≠y} exp d.
        weighted: Σ_{j≠y} d·exp d.
        squares: Σ_{j≠y} exp 2d.
        total: Σ z over all columns.
        label: z of the label; 0 until its column is folded.
        before: the maximum of z over the columns before the label.
        after: the maximum of z over the columns after the label.
        second: the second-largest z over all columns but the label's; equal to the largest on a tie.
    """

    anchor: Tensor
    rest: Tensor
    weighted: Tensor
    squares: Tensor
    total: Tensor
    label: Tensor
    before: Tensor
    after: Tensor
    second: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> RowSums:
        """Return the planes of sums (9, …), as views."""
        return cls(*sums.unbind(0))

    @classmethod
    def start(cls, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return the sums over no columns, (9, *shape), with the anchor at 0."""
        sums = torch.zeros((len(cls._fields), *shape), dtype=torch.float64, device=device)
        sums[ROW_SUM["before"] :].fill_(-torch.inf)
        return sums


# The plane of each sum. The three maxima are the last.
ROW_SUM: dict[str, int] = {name: plane for plane, name in enumerate(RowSums._fields)}


class Scoring(NamedTuple):
    """The arguments of every operator that say which tokens are scored, and on which logits, in the schemas' order.

    Attributes:
        ignore_index: the label that is not scored.
        shift: whether position t is scored against label t+1.
        logit_scale: multiplies the logits, first.
        temperature: divides the logits, last.
        softcap: the cap of the logits' magnitude in between; None for none.
    """

    ignore_index: int
    shift: bool
    logit_scale: float
    temperature: float
    softcap: float | None

    @property
    def transform(self) -> tuple[float, float, float | None]:
        """Return logit_scale, temperature and softcap, as a row pass takes them."""
        return self.logit_scale, self.temperature, self.softcap


class Transform(NamedTuple):
    """z = rate·u(x), where u(x) is x, or cap·tanh(inner·x) with a softcap.

    Attributes:
        rate: dz/du.
        inner: scale/cap; 1 without a softcap.
        cap: the softcap; None without one.
        slope: dz/dx where u(x) = 0.
    """

    rate: float
    inner: float
    cap: float | None
    slope: float

    @classmethod
    def of(cls, logit_scale: float, temperature: float, softcap: float | None) -> Transform:
        """Return the transform z = softcap·tanh(x·logit_scale/softcap)/temperature, or x·logit_scale/temperature."""
        slope = logit_scale / temperature
        if softcap is None:
            return cls(slope, 1.0, None, slope)
        return cls(1.0 / temperature, logit_scale / softcap, softcap, slope)

    def u(self, x: Tensor) -> Tensor:
        """Return u(x)."""
        return x if self.cap is None else self.cap * torch.tanh(x * self.inner)

    def z(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | float]:
        """Return z of raw logits x, to which the bias is added first, and dz/dx."""
        u = self.u(x if bias is None else x + bias.to(x.dtype))
        return u * self.rate, self.derivative(u)

    def derivative(self, u: Tensor) -> Tensor | float:
        """Return dz/dx where u(x) = u."""
        return self.slope if self.cap is None else self.slope * (1 - (u / self.cap) ** 2)


# Special values of a shard's labels. Other labels are its columns, -1 for a label before the shard, and its number of
# columns or more for a label after it.
UNSCORED = -2  # ignore_index
INVALID = -3  # in no shard


def scored_targets(
    labels: Tensor, cu_seqlens: Tensor | None, *, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor]:
    """Return the label that each position is scored against, and whether it is scored, both (..., T').

    Args:
        labels: (..., T).
        cu_seqlens: None, or the packed boundaries (S+1,), which the shift does not cross.
        ignore_index: the label that is not scored.
        shift: whether position t is scored against label t+1: T' is then T − 1, otherwise T.
    """
    targets = labels[..., 1:] if shift else labels
    scored = targets != ignore_index
    if shift and cu_seqlens is not None:
        tokens = labels.shape[-1]
        starts = torch.zeros(tokens + 1, dtype=torch.bool, device=labels.device)
        # If nobody checks boundaries, one past the end must not end the process: a GPU asserts that indices are in
        # range.
        starts.index_fill_(0, cu_seqlens.long().clamp(0, tokens), True)
        scored = scored & ~starts[1:-1]
    return targets, scored


def boundaries_are_wrong(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return whether boundaries do not rise from 0 to the number of tokens, () bool, without a read on the host."""
    ends = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != tokens)
    return ends | (cu_seqlens.diff() < 0).any()


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise `ValueError` unless `cu_seqlens` rises from 0 to the number of tokens. The host reads it."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {bounds}")


def check_labels(targets: Tensor, scored: Tensor, vocabulary: int) -> None:
    """Raise `IndexError` at the first scored label outside [0, vocabulary). The host reads the labels."""
    bad = scored & ((targets < 0) | (targets >= vocabulary))
    if bad.any():
        position = bad.nonzero()[0].tolist()
        raise IndexError(
            f"label {int(targets[tuple(position)])} at scored position {position} is outside [0, {vocabulary}) and is "
            "not ignore_index"
        )

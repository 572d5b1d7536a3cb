"""Compute log-probs, statistics and what a backward needs from the sums of rows: `linear_finalize`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.contract import (
    COLUMNS,
    LIMIT,
    LINEAR_STATISTICS,
    RowSums,
    Scoring,
    Statistic,
    Transform,
    statistic_dtype,
    widened,
)
from fastpref_kernels.linear.backend import Backend
from fastpref_kernels.linear.rows import Rows

_NEAR = 600.0  # below this, exp(a - z_y) is a float64 with room to spare


def kept_tiles(shares: Tensor, labels: Tensor, filter_eps: float) -> Tensor:
    """Return which tiles of each row carry gradient (chunks, R): those with enough mass, the label, or a NaN."""
    chunk = torch.arange(shares.shape[0], device=shares.device)[:, None]
    return ~(shares < filter_eps) | (torch.div(labels, COLUMNS, rounding_mode="floor") == chunk)


class _Finalized(NamedTuple):
    """Rows whose sums are over all columns, each (R,).

    Attributes:
        sums: the sums, at `highest`.
        highest: the anchor of the sums.
        e_y: exp(z_y − highest).
        whole: Σ exp(z − highest) over all columns.
        gap: highest − z_y.
        logp: the log-prob of the label.
        vocabulary: the number of all columns.
    """

    sums: RowSums
    highest: Tensor
    e_y: Tensor
    whole: Tensor
    gap: Tensor
    logp: Tensor
    vocabulary: Tensor | int


def _entropy(r: _Finalized) -> Tensor:
    """Return the entropy, relative to the label if it is near the anchor: an entropy near 0 then keeps its digits."""
    return torch.where(
        r.gap < _NEAR,
        -r.logp - (r.sums.weighted + r.gap * r.sums.rest) / r.whole,
        r.whole.log() - (r.sums.weighted - (r.e_y * r.gap).masked_fill(r.e_y == 0, 0.0)) / r.whole,
    )


def _top2_margin(r: _Finalized) -> Tensor:
    """Return the largest z minus the second largest, from the label and the two largest of the others."""
    others = torch.maximum(r.sums.before, r.sums.after)
    best = torch.maximum(others, r.sums.label)
    # The second largest is the label, the largest of the others, or, if the label is below both, their second.
    return best - torch.maximum(torch.minimum(others, r.sums.label), r.sums.second)


# Each statistic of rows, (R,), except the mass that a filter drops, which does not follow from the row's sums.
_STATISTICS: dict[Statistic, Callable[[_Finalized], Tensor]] = {
    Statistic.LSE: lambda r: r.highest + r.whole.log(),
    Statistic.ENTROPY: _entropy,
    Statistic.MEAN_LOGITS: lambda r: r.sums.total / r.vocabulary,
    Statistic.IS_TOP1: lambda r: (r.sums.before < r.sums.label) & (r.sums.after <= r.sums.label),
    Statistic.LOG_SUM_SQ_PROBS: lambda r: (r.sums.squares + r.e_y * r.e_y).log() - 2 * r.whole.log(),
    Statistic.TOP2_MARGIN: _top2_margin,
}


def _finalize(sums: RowSums, vocabulary: Tensor | int) -> _Finalized:
    """Compute the log-probs of rows, and the terms of their statistics."""
    highest = sums.anchor.masked_fill(sums.anchor == -torch.inf, 0.0)
    e_y = (sums.label - highest).exp()
    whole = sums.rest + e_y
    gap = highest - sums.label
    near = -torch.log1p(sums.rest * gap.clamp(max=_NEAR).exp())
    logp = torch.where(gap < _NEAR, near, -gap - whole.log()).masked_fill(sums.label == torch.inf, torch.nan)
    return _Finalized(sums, highest, e_y, whole, gap, logp, vocabulary)


def _finish_store(
    backend: Backend, store: Tensor, rows: Rows, own: Tensor, anchor: Tensor, found: _Finalized, scoring: Scoring
) -> None:
    """Rescale kept exponentials to the backward's anchor, and write the values that its products need at the label.

    Args:
        backend: whose `rescale` to use.
        store: (n, V), n no fewer than the rows.
        rows: with labels that are columns of the store, or outside of them.
        own: (R,), the anchor that the exponentials are at.
        anchor: (R,), the anchor to bring them to: `own`, or the anchor of all columns.
        found: the rows' results.
        scoring: the transform of the logits.
    """
    store = store[: len(rows)]
    if own is not found.sums.anchor:
        factor = torch.where(own == -torch.inf, 0.0, own - found.highest).exp()
        backend.rescale(store, torch.where(anchor == own, 1.0, factor)[None], store.shape[1])
    transform = Transform.of(*scoring.transform)
    slope = transform.derivative(found.sums.label / transform.rate)
    at_label = -found.sums.rest * (found.highest - anchor).exp() * slope
    here = torch.arange(len(rows), device=store.device), rows.label.clamp(0, store.shape[1] - 1)
    inside = rows.label == here[1]
    store[here] = torch.where(inside, at_label.to(store.dtype), store[here])


class Wanted(NamedTuple):
    """The options of the results that are computed from the sums of rows.

    Attributes:
        scoring: the transform of the logits.
        stats: the bits of the statistics that are asked for.
        dtype: the dtype of the log-probs.
        filter_eps: the mass below which a tile is left out of the gradient, or None.
    """

    scoring: Scoring
    stats: int
    dtype: torch.dtype
    filter_eps: float | None


def results(
    backend: Backend,
    rows: Rows,
    own: RowSums,
    whole: RowSums,
    shares: Tensor,
    vocabulary: Tensor | int,
    store: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, ...]:
    """Return the results of `fastpref::linear_logprobs`, `contract.LinearResult`, from the sums of rows.

    Args:
        backend: whose kernels change the kept exponentials.
        rows: with labels that are columns here, or outside of them.
        own: (R,) each, the sums over the columns here, which may be a shard of all.
        whole: the sums over all columns, at an anchor that is no lower; `own` where all columns are here.
        shares: (chunks, R), each tile's mass at `own`'s anchor; no chunks without `filter_eps`.
        vocabulary: the number of all columns.
        store: (n, V) or None: receives what the gradient's products need at the label.
        wanted: the options.
    """
    found = _finalize(whole, vocabulary)
    # A shard keeps its own anchor, unless that is so far from the anchor of all columns that float32 has no room.
    moved = ~(found.highest - own.anchor < math.log(LIMIT))
    anchor = torch.where(moved, found.highest, own.anchor)
    if store is not None and len(rows) and store.shape[1]:
        _finish_store(backend, store, rows, own.anchor, anchor, found, wanted.scoring)
    inverse = (anchor - found.highest).exp() / found.whole
    if len(shares):
        scale = inverse * torch.where(own.anchor == -torch.inf, 0.0, own.anchor - anchor).exp()
        shares = (shares * scale).float()

    def values(statistic: Statistic) -> Tensor:
        if statistic is not Statistic.DROPPED_MASS:
            return _STATISTICS[statistic](found)
        if wanted.filter_eps is None:
            return shares.new_zeros(len(rows))
        return shares.masked_fill(kept_tiles(shares, rows.label, wanted.filter_eps), 0.0).sum(0)

    asked = {member: values(member) for member in LINEAR_STATISTICS.values() if wanted.stats & member}
    entropy = [asked[Statistic.ENTROPY]] if Statistic.ENTROPY in asked else []
    statistics = []
    for member in LINEAR_STATISTICS.values():
        dtype = statistic_dtype(member, wanted.dtype)
        statistics.append(rows.spread(asked[member], dtype) if member in asked else shares.new_empty(0, dtype=dtype))
    norm = torch.stack([anchor, inverse, found.logp, *entropy])
    return (
        rows.spread(found.logp, wanted.dtype),
        rows.spread(norm, wanted.dtype),
        rows.spread(shares, torch.float32),
        *statistics,
    )


def linear_finalize(
    backend: Backend,
    hidden: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    shard: Tensor,
    sums: Tensor,
    whole_sums: Tensor,
    masses: Tensor,
    store: Tensor | None,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    stats: int,
    count: int | None,
    filter_eps: float | None,
) -> tuple[Tensor, ...]:
    """Run `fastpref::linear_finalize`."""
    scoring = Scoring(ignore_index, shift, logit_scale, temperature, softcap)
    rows = Rows.of(labels, cu_seqlens, ignore_index, shift, count)
    every = slice(None)
    own, whole = (RowSums.of(rows.take(planes, every)) for planes in (sums, whole_sums))
    wanted = Wanted(scoring, stats, widened(hidden.dtype), filter_eps)
    return results(backend, rows, own, whole, rows.take(masses, every), shard[1], store, wanted)

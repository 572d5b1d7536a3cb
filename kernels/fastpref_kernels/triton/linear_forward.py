"""The row pass over a tile of logits that a library product just wrote.

A row's state is carried from tile to tile. Within a tile, sums are kept per lane and reduced once, at the row's anchor,
so there is no running maximum: a logit costs a subtraction, a multiplication, an exponential and an addition. The label
is kept out of the sums by giving its block, and the last one, a masked pass of their own. A row whose logits lie far
above its anchor is done again, raised to its maximum, while the tile is still in the cache.

The order of a row's sums depends on the tiles' columns alone, and not on what else is in the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastpref_kernels.contract import Statistic
from fastpref_kernels.triton.common import join, power, power_rate, tanh, top2
from fastpref_kernels.triton.constants import (
    AFTER,
    ANCHOR,
    BEFORE,
    ENTROPY,
    FLOOR,
    HIGHEST,
    LABEL,
    LOG_SUM_SQ_PROBS,
    MEAN_LOGITS,
    REST,
    SECOND,
    SQUARES,
    TOP2_MARGIN,
    TOTAL,
    WEIGHTED,
)

# The statistics that the row passes keep the sums of. lse needs no more than a log-prob does, and the mass that a
# filter drops is made of the masses of tiles.
KNOWN: tl.constexpr = tl.constexpr(
    (
        Statistic.LSE
        | Statistic.ENTROPY
        | Statistic.MEAN_LOGITS
        | Statistic.IS_TOP1
        | Statistic.LOG_SUM_SQ_PROBS
        | Statistic.TOP2_MARGIN
        | Statistic.DROPPED_MASS
    ).value
)

# These arguments change from tile to tile and from batch to batch; a new value must not compile a new kernel. ALIGN and
# STORE_ALIGN say how rows are aligned. A tensor with one number for each row begins anywhere.
LENGTHS = ["C", "column", "stride_z", "stride_store", "state_row", "state_r", "stride_anchors", "stride_masses"]
PER_ROW = ["targets", "state", "anchors", "masses"]


class Row(NamedTuple):
    """A row of a tile.

    Attributes:
        logits: where it begins.
        bias: where the bias of the tile's columns begins, or None.
        C: the number of columns.
        own: the label's column in the tile; -1 where it is in another.
        rate, inner: z = rate * u, and u = x or tanh(inner * x).
        slope: dz/dx where u is 0.
        to: where exp(d) * dz/dx is stored, or None.
    """

    logits: Any
    bias: Any
    C: Any
    own: Any
    rate: Any
    inner: Any
    slope: Any
    to: Any


@triton.jit
def load_u(row, bias, k, mask, inner, CAP: tl.constexpr, ACC: tl.constexpr):
    """Return u = x + bias, or tanh((x + bias) * inner). The rest of the transform is one factor: z = rate * u."""
    if mask is None:
        u = tl.load(row + k).to(ACC)
        if bias is not None:
            u += tl.load(bias + k).to(ACC)
    else:
        u = tl.load(row + k, mask=mask, other=0.0).to(ACC)
        if bias is not None:
            u += tl.load(bias + k, mask=mask, other=0.0).to(ACC)
    if CAP:
        u = tanh(u * inner, ACC)
    return u


@triton.jit
def _stored(e, u, slope, CAP: tl.constexpr):
    """Return e * dz/dx."""
    if CAP:
        return e * (slope * (1.0 - u * u))
    else:
        return e * slope


@triton.jit
def _add_masked(
    row, k, anchor, total, rest, weighted, squares, STATS: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr
):
    """Add a block that holds the label, the row's end or logits of -inf.

    Returns u, which is -inf where it does not count, and the sums.
    """
    keep = (k < row.C) & (k != row.own)
    u = load_u(row.logits, row.bias, k, k < row.C, row.inner, CAP, ACC)
    if MEAN_LOGITS & STATS:
        total += tl.where(k < row.C, u, 0.0)
    d = (u * row.rate - anchor) * power_rate(1.0, ACC)
    e = tl.where(keep, power(d, ACC), 0.0)
    rest += e
    if ENTROPY & STATS:
        # A NaN that the floor swallows is in e.
        weighted += e * tl.where(keep, tl.maximum(d, FLOOR), 0.0)
    if LOG_SUM_SQ_PROBS & STATS:
        squares += e * e
    if row.to is not None:
        value = tl.where(keep, _stored(e, u, row.slope, CAP), 0.0)
        tl.store(row.to + k, value.to(row.to.dtype.element_ty), mask=k < row.C)
    return tl.where(keep, u, -float("inf")), total, rest, weighted, squares


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=PER_ROW)
def fold_kernel(
    z, bias, targets, state, anchors, masses, store,  # (R, C), (C,), (R,), (planes, R), (R,), (R,), (R, C)
    C, column, stride_z, stride_store, state_row, state_r, stride_anchors, stride_masses,
    rate_high, rate_low, inner_high, inner_low, slope_high, slope_low,
    LIMIT: tl.constexpr, STATS: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    STORE_ALIGN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program r adds row r of the tile to its state, and raises its anchor where the sum would reach LIMIT."""
    tl.static_assert((~KNOWN & STATS) == 0, "fold_kernel has no branch for one of these statistics")
    r = tl.program_id(0).to(tl.int64)
    rate = join(rate_high, rate_low, ACC)
    inner = join(inner_high, inner_low, ACC)
    slope = join(slope_high, slope_low, ACC)
    unit = power_rate(1.0, ACC)
    minus_inf = -float("inf")

    z += tl.multiple_of(r * stride_z, ALIGN)
    to = store
    if store is not None:
        to = store + tl.multiple_of(r * stride_store, STORE_ALIGN)
    state += r * state_r
    plane = state_row.to(tl.int64)
    anchor = tl.load(state + ANCHOR * plane).to(ACC)
    local = (tl.load(targets + r) - column).to(tl.int32)
    inside = (local >= 0) & (local < C)
    own = tl.where(inside, local, -1)
    row = Row(z, bias, C, own, rate, inner, slope, to)
    u_y = load_u(z, bias, own, inside, inner, CAP, ACC)
    tl.store(state + LABEL * plane, (u_y * rate).to(tl.float64), mask=inside)
    full = C // BLOCK
    blocks = tl.cdiv(C, BLOCK)
    special = tl.where(inside, own // BLOCK, full)

    rest = tl.zeros((BLOCK,), ACC)
    weighted = tl.zeros((BLOCK,), ACC)
    squares = tl.zeros((BLOCK,), ACC)
    total = tl.zeros((BLOCK,), ACC)
    best = tl.full((BLOCK,), minus_inf, ACC)
    second = tl.full((BLOCK,), minus_inf, ACC)
    before = tl.full((), minus_inf, ACC)
    after = tl.full((), minus_inf, ACC)
    # Full blocks before the label's, then those after it: nothing is masked, nothing is compared.
    for side in range(0, 2):
        begin = tl.where(side == 0, 0, special + 1)
        end = tl.where(side == 0, tl.minimum(special, full), full)
        top = tl.full((BLOCK,), minus_inf, ACC)
        for block in tl.range(begin, end, num_stages=STAGES):
            k = block * BLOCK + tl.arange(0, BLOCK)
            u = load_u(z, bias, k, None, inner, CAP, ACC)
            d = (u * rate - anchor) * unit
            e = power(d, ACC)
            rest += e
            if ENTROPY & STATS:
                weighted += e * d  # NaN where 0 * -inf, which is looked for afterwards
            if LOG_SUM_SQ_PROBS & STATS:
                squares += e * e
            if MEAN_LOGITS & STATS:
                total += u
            if HIGHEST & STATS:
                top = tl.maximum(top, u)
            if TOP2_MARGIN & STATS:
                best, second = top2(best, second, u, minus_inf)
            if store is not None:
                tl.store(to + k, _stored(e, u, slope, CAP).to(store.dtype.element_ty))
        if HIGHEST & STATS:
            # A label in another tile has all of this one's columns on one side.
            peak = tl.max(top)
            left = (side == 0) & (local >= 0)
            before = tl.maximum(before, tl.where(left, peak, minus_inf))
            after = tl.maximum(after, tl.where(left, minus_inf, peak))
    # The label's block and the last, which may be the same one.
    for block in range(special, blocks, tl.maximum(full - special, 1)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        u, total, rest, weighted, squares = _add_masked(row, k, anchor, total, rest, weighted, squares, STATS, CAP, ACC)
        if HIGHEST & STATS:
            before = tl.maximum(before, tl.max(tl.where(k < local, u, minus_inf)))
            after = tl.maximum(after, tl.max(tl.where(k > local, u, minus_inf)))
        if TOP2_MARGIN & STATS:
            best, second = top2(best, second, u, minus_inf)

    s = tl.sum(rest)
    w = tl.sum(weighted)
    q = tl.sum(squares)
    t = tl.sum(total)
    old_rest = tl.load(state + REST * plane)
    old_anchor = anchor.to(tl.float64)  # a number of ACC's
    new_anchor = old_anchor
    gap = tl.zeros((), tl.float64)
    factor = tl.full((), 1.0, tl.float64)
    # Written so that a NaN takes this way too: it then reaches the state by the sums themselves.
    fits = old_rest + s.to(tl.float64) < LIMIT
    again = fits == 0
    if ENTROPY & STATS:
        again = again | (w != w)
    if again:
        top = tl.full((BLOCK,), minus_inf, ACC)
        for block in range(0, blocks):
            k = block * BLOCK + tl.arange(0, BLOCK)
            u = load_u(z, bias, k, k < C, inner, CAP, ACC)
            top = tl.maximum(top, tl.where((k < C) & (k != own), u, minus_inf))
        # An anchor that nothing has been summed at, which may be of no finite label, is replaced.
        counts = fits | (old_rest > 0.0)
        raised = tl.maximum(tl.where(counts, old_anchor, minus_inf), (tl.max(top) * rate).to(tl.float64))
        new_anchor = tl.where(fits, old_anchor, raised)
        gap = tl.where(fits | (counts == 0), 0.0, old_anchor - new_anchor)
        factor = tl.where(counts, tl.exp(gap), 0.0)
        # Any number where there is nothing but -inf yet: a sum of 0, and the row stays without an anchor.
        anchor = tl.where(new_anchor == minus_inf, 0.0, new_anchor).to(ACC)
        rest = tl.zeros((BLOCK,), ACC)
        weighted = tl.zeros((BLOCK,), ACC)
        squares = tl.zeros((BLOCK,), ACC)
        tl.debug_barrier()  # other threads now overwrite the stores above
        for block in range(0, blocks):
            k = block * BLOCK + tl.arange(0, BLOCK)
            u, total, rest, weighted, squares = _add_masked(
                row, k, anchor, total, rest, weighted, squares, STATS, CAP, ACC
            )
        s = tl.sum(rest)
        w = tl.sum(weighted)
        q = tl.sum(squares)

    mass = s.to(tl.float64)
    tl.store(anchors + r * stride_anchors, new_anchor)
    tl.store(masses + r * stride_masses, mass)
    tl.store(state + ANCHOR * plane, new_anchor)
    new_rest = factor * old_rest + mass
    tl.store(state + REST * plane, new_rest)
    if ENTROPY & STATS:
        at = state + WEIGHTED * plane
        # From powers of 2, where they are that, to nats.
        tl.store(at, factor * (tl.load(at) + gap * old_rest) + w.to(tl.float64) / tl.full((), unit, tl.float64))
    if LOG_SUM_SQ_PROBS & STATS:
        at = state + SQUARES * plane
        tl.store(at, factor * factor * tl.load(at) + q.to(tl.float64))
    if MEAN_LOGITS & STATS:
        at = state + TOTAL * plane
        tl.store(at, tl.load(at) + t.to(tl.float64) * rate.to(tl.float64))
    if HIGHEST & STATS:
        # A maximum leaves NaNs out, and nothing is on top of one; it is in the sum.
        nan = new_rest - new_rest
        at_before = state + BEFORE * plane
        at_after = state + AFTER * plane
        old_before = tl.load(at_before)
        old_after = tl.load(at_after)
        if TOP2_MARGIN & STATS:
            best, second = tl.reduce((best, second), 0, top2)
            best = (best * rate).to(tl.float64)
            second = (second * rate).to(tl.float64)
            _, second = top2(tl.maximum(old_before, old_after), tl.load(state + SECOND * plane), best, second)
            tl.store(state + SECOND * plane, second)
            # The sum is also NaN where a logit is +inf, which has a margin.
            nan = tl.where(second == second, 0.0, second)
        tl.store(at_before, tl.maximum(old_before, (before * rate).to(tl.float64)) + nan)
        tl.store(at_after, tl.maximum(old_after, (after * rate).to(tl.float64)) + nan)

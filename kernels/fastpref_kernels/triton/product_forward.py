"""Multiply hidden @ weight.T and fold its logits in one kernel, without a tile of logits in memory.

A program multiplies a block of rows by a block of columns, then folds the block while it is in registers, a piece of
its columns at a time: the label is taken out, exponentials are taken at the row's anchor, and a row whose sum in this
piece is too large for that is anchored at its maximum in the piece instead. What each piece gives of each row goes to
memory of its own, and a second kernel adds the pieces up, in float64 and in the order of the columns.

A row's bits depend on the size of blocks and pieces alone. Where a row needs another anchor, or has its label in the
piece, all rows of the block go that way, but each row keeps only what it needs itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastpref_kernels.triton.common import LOG2E, join, tanh, top2, top2_of
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
from fastpref_kernels.triton.linear_forward import KNOWN


@triton.jit
def _piece(u, i: tl.constexpr, HALVINGS: tl.constexpr):
    """Return the i-th of 2^HALVINGS equal stretches of a block's columns, in the registers that it is in."""
    for level in tl.static_range(HALVINGS):
        left, right = tl.split(tl.permute(tl.reshape(u, (u.shape[0], 2, u.shape[1] // 2)), (0, 2, 1)))
        if (i >> (HALVINGS - 1 - level)) & 1:
            u = right
        else:
            u = left
    return u


class Rows(NamedTuple):
    """A block of rows to fold, and where the results go.

    Attributes:
        r: the rows' indices.
        target: the labels.
        anchor: the anchors that the label's logit gives.
        R, V: the numbers of rows and columns.
        bias: (V,) or None.
        rate, inner: z = rate * u, and u = x or tanh(inner * x).
        slope: dz/dx where u is 0.
        state: (planes of RowSums, R).
        partials: (planes, pieces, R).
        store: (R, V) or None, what the gradient's products need.
        stride_store: the distance between rows of `store`.
    """

    r: Any
    target: Any
    anchor: Any
    R: Any
    V: Any
    bias: Any
    rate: Any
    inner: Any
    slope: Any
    state: Any
    partials: Any
    store: Any
    stride_store: Any


@triton.jit
def _sums(u, anchor, rate, slope, to, counted, end, STATS: tl.constexpr, CAP: tl.constexpr):
    """Return each row's sums of exp(d), of it times d/ln 2 and of exp(2d), d = u * rate - anchor.

    exp(d) * dz/dx is stored to `to` and after it, of rows that are `counted` and of columns before `end`.
    """
    # Fused by name: a product that both calls of this share would be kept in registers from the one to the other.
    d = tl.fma(u, rate, -anchor[:, None]) * LOG2E
    e = tl.exp2(d)
    rest = tl.sum(e, 1)
    weighted = rest
    squares = rest
    if ENTROPY & STATS:
        # 0 * log 0 is 0. A NaN that the floor swallows is in e.
        weighted = tl.sum(e * tl.maximum(d, FLOOR), 1)
    if LOG_SUM_SQ_PROBS & STATS:
        squares = tl.sum(e * e, 1)
    if to is not None:
        if CAP:
            u = tl.maximum(u, -1.0)  # where u is -inf, e is 0
            e *= 1.0 - u * u
        value = (e * slope).to(to.dtype.element_ty)
        c = tl.arange(0, u.shape[1])[None, :]
        if end >= u.shape[1]:
            tl.store(to[:, None] + c, value, mask=counted[:, None])
        else:
            tl.store(to[:, None] + c, value, mask=counted[:, None] & (c < end))
    return rest, weighted, squares


@triton.jit
def _fold(u, first, rows, LIMIT: tl.constexpr, STATS: tl.constexpr, CAP: tl.constexpr, STORE_ALIGN: tl.constexpr):
    """Fold products u of rows and of columns from `first` on, which are 0 past the last column."""
    r, target, anchor, R, V = rows.r, rows.target, rows.anchor, rows.R, rows.V
    minus_inf = -float("inf")
    width: tl.constexpr = u.shape[1]
    c = tl.arange(0, width)
    end = V - first
    counted = r < tl.where(end > 0, R, 0)  # the last block may have pieces past the last column
    if rows.bias is not None:
        u += tl.load(rows.bias + first + c, mask=c < end, other=0.0).to(tl.float32)[None, :]
    if CAP:
        u = tanh(u * rows.inner, tl.float32)
    total = tl.sum(u, 1) if MEAN_LOGITS & STATS else anchor
    if end < width:
        u = tl.where((c < end)[None, :], u, minus_inf)
    local = (target - first).to(tl.int32)
    before = anchor
    after = anchor
    if HIGHEST & STATS:
        before = tl.max(tl.where(c[None, :] < local[:, None], u, minus_inf), 1)
        after = tl.max(tl.where(c[None, :] > local[:, None], u, minus_inf), 1)
    # Few pieces have a label: the others pay for none.
    own = (local >= 0) & (local < width)
    if tl.max(own.to(tl.int32), 0) > 0:
        label = c[None, :] == local[:, None]
        u_y = tl.sum(tl.where(label, u, 0.0), 1)
        tl.store(rows.state + LABEL * R.to(tl.int64) + r, (u_y * rows.rate).to(tl.float64), mask=own)
        u = tl.where(label, minus_inf, u)
    second = anchor
    if TOP2_MARGIN & STATS:
        _, second = top2_of(u, 1)

    to = rows.store
    if rows.store is not None:
        to = rows.store + tl.multiple_of(r.to(tl.int64) * rows.stride_store, STORE_ALIGN) + first
    rest, weighted, squares = _sums(u, anchor, rows.rate, rows.slope, to, counted, end, STATS, CAP)
    # Written so that a NaN takes this way too: it then reaches the state by the sums themselves.
    fits = rest < LIMIT
    if tl.min(fits.to(tl.int32), 0) == 0:
        top = tl.max(u, 1) * rows.rate
        # Nothing but -inf: any anchor gives a sum of 0.
        anchor = tl.where(fits, anchor, tl.where(top == minus_inf, 0.0, top))
        tl.debug_barrier()  # other threads now overwrite the stores above
        s, w, q = _sums(u, anchor, rows.rate, rows.slope, to, counted & (fits == 0), end, STATS, CAP)
        rest = tl.where(fits, rest, s)
        weighted = tl.where(fits, weighted, w)
        squares = tl.where(fits, squares, q)

    plane = tl.cdiv(V, width).to(tl.int64) * R
    at = rows.partials + (first // width).to(tl.int64) * R + r
    tl.store(at, anchor, mask=counted)
    at += plane
    tl.store(at, rest, mask=counted)
    if ENTROPY & STATS:
        at += plane
        tl.store(at, weighted, mask=counted)
    if LOG_SUM_SQ_PROBS & STATS:
        at += plane
        tl.store(at, squares, mask=counted)
    if MEAN_LOGITS & STATS:
        at += plane
        tl.store(at, total, mask=counted)
    if HIGHEST & STATS:
        at += plane
        tl.store(at, before, mask=counted)
        at += plane
        tl.store(at, after, mask=counted)
    if TOP2_MARGIN & STATS:
        at += plane
        tl.store(at, second, mask=counted)


@triton.jit(do_not_specialize=["R", "V"], do_not_specialize_on_alignment=["targets", "state", "partials"])
def product_fold_kernel(
    x, weight, bias, targets,  # (R, H), (V, H), (V,), (R,)
    state, partials, store,  # (planes of RowSums, R), (planes, pieces, R), (R, V)
    R, V, H, stride_x, stride_xh, stride_w, stride_wh, stride_store,
    rate_high, rate_low, inner_high, inner_low, slope_high, slope_low,
    LIMIT: tl.constexpr, STATS: tl.constexpr, CAP: tl.constexpr, STORE_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALVINGS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Fold a block of rows by columns. DESCRIBED: x and weight are tensor descriptors."""
    tl.static_assert((~KNOWN & STATS) == 0, "product_fold_kernel has no branch for one of these statistics")
    # GROUP_M blocks of rows go over the columns side by side.
    blocks = tl.cdiv(V, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks)
    within = tl.program_id(0) % (GROUP_M * blocks)
    height = tl.minimum(tl.cdiv(R, BLOCK_M) - group * GROUP_M, GROUP_M)
    row = (group * GROUP_M + within % height) * BLOCK_M
    column = within // height * BLOCK_N
    r = row + tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIBED:
        for k in range(0, H, BLOCK_K):
            product = tl.dot(x.load([row, k]), weight.load([column, k]).T, product, input_precision="ieee")
    else:
        n = column + tl.arange(0, BLOCK_N)
        at_x = x + r.to(tl.int64)[:, None] * stride_x
        at_w = weight + n.to(tl.int64)[None, :] * stride_w
        for begin in range(0, H, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K).to(tl.int64)
            a = tl.load(at_x + k[None, :] * stride_xh, mask=(r < R)[:, None] & (k < H)[None, :], other=0.0)
            b = tl.load(at_w + k[:, None] * stride_wh, mask=(k < H)[:, None] & (n < V)[None, :], other=0.0)
            product = tl.dot(a, b, product, input_precision="ieee")

    target = tl.load(targets + r, mask=r < R, other=-1)
    anchor = tl.load(state + ANCHOR * R.to(tl.int64) + r, mask=r < R, other=float("inf")).to(tl.float32)
    rate = join(rate_high, rate_low, tl.float32)
    inner = join(inner_high, inner_low, tl.float32)
    slope = join(slope_high, slope_low, tl.float32)
    width: tl.constexpr = BLOCK_N >> HALVINGS
    rows = Rows(r, target, anchor, R, V, bias, rate, inner, slope, state, partials, store, stride_store)
    for i in tl.static_range(1 << HALVINGS):
        _fold(_piece(product, i, HALVINGS), column + i * width, rows, LIMIT, STATS, CAP, STORE_ALIGN)


@triton.jit(do_not_specialize=["R", "pieces"], do_not_specialize_on_alignment=["state", "partials"])
def combine_kernel(
    state,  # (planes of RowSums, R)
    partials,  # (planes, pieces, R)
    R,
    pieces,
    rate_high,
    rate_low,
    STATS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add up all pieces of BLOCK_R rows, at the highest anchor of those that have anything to add."""
    tl.static_assert((~KNOWN & STATS) == 0, "combine_kernel has no branch for one of these statistics")
    rate = join(rate_high, rate_low, tl.float64)
    minus_inf = -float("inf")
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < R
    plane = pieces.to(tl.int64) * R
    state += r
    row = R.to(tl.int64)

    highest = tl.full((BLOCK_P, BLOCK_R), minus_inf, tl.float32)
    for first in range(0, pieces, BLOCK_P):
        piece = first + tl.arange(0, BLOCK_P)
        mask = (piece < pieces)[:, None] & inside[None, :]
        at = partials + piece.to(tl.int64)[:, None] * R + r[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        mass = tl.load(at + plane, mask=mask, other=0.0)
        highest = tl.maximum(highest, tl.where(mass != 0.0, a, minus_inf))
    anchor = tl.max(highest, 0).to(tl.float64)
    # Where nothing is summed, the row keeps its label's anchor, unless that is -inf or NaN.
    old = tl.load(state, mask=inside, other=0.0)
    unanchored = (anchor == minus_inf) & (old == minus_inf)
    anchor = tl.where(anchor == minus_inf, tl.where(old > minus_inf, old, 0.0), anchor)

    rest = tl.zeros((BLOCK_P, BLOCK_R), tl.float64)
    weighted = tl.zeros((BLOCK_P, BLOCK_R), tl.float64)
    squares = tl.zeros((BLOCK_P, BLOCK_R), tl.float64)
    total = tl.zeros((BLOCK_P, BLOCK_R), tl.float64)
    before = tl.full((BLOCK_P, BLOCK_R), minus_inf, tl.float32)
    after = tl.full((BLOCK_P, BLOCK_R), minus_inf, tl.float32)
    best = tl.full((BLOCK_P, BLOCK_R), minus_inf, tl.float32)
    second = tl.full((BLOCK_P, BLOCK_R), minus_inf, tl.float32)
    for first in range(0, pieces, BLOCK_P):
        piece = first + tl.arange(0, BLOCK_P)
        mask = (piece < pieces)[:, None] & inside[None, :]
        at = partials + piece.to(tl.int64)[:, None] * R + r[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        mass = tl.load(at + plane, mask=mask, other=0.0)
        counts = mass != 0.0
        # A piece without mass is anchored anywhere: where the row is, so that what was stored of it stays 0.
        tl.store(at, tl.where(counts, a, anchor[None, :].to(tl.float32)), mask=mask)
        gap = tl.where(counts, a.to(tl.float64) - anchor[None, :], 0.0)
        factor = tl.where(counts, tl.exp(gap), 0.0)
        at += plane
        rest += factor * mass.to(tl.float64)
        if ENTROPY & STATS:
            at += plane
            # From powers of 2 to nats.
            w = tl.load(at, mask=mask, other=0.0).to(tl.float64) / LOG2E
            weighted += factor * (w + gap * mass.to(tl.float64))
        if LOG_SUM_SQ_PROBS & STATS:
            at += plane
            squares += factor * factor * tl.load(at, mask=mask, other=0.0).to(tl.float64)
        if MEAN_LOGITS & STATS:
            at += plane
            total += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        if HIGHEST & STATS:
            at += plane
            piece_before = tl.load(at, mask=mask, other=minus_inf)
            at += plane
            piece_after = tl.load(at, mask=mask, other=minus_inf)
            before = tl.maximum(before, piece_before)
            after = tl.maximum(after, piece_after)
        if TOP2_MARGIN & STATS:
            at += plane
            piece_second = tl.load(at, mask=mask, other=minus_inf)
            best, second = top2(best, second, tl.maximum(piece_before, piece_after), piece_second)

    s = tl.sum(rest, 0)
    # A shard of nothing but -inf keeps -inf as its anchor, so that no other shard is rescaled to it.
    tl.store(state + ANCHOR * row, tl.where(unanchored, minus_inf, anchor), mask=inside)
    tl.store(state + REST * row, s, mask=inside)
    if ENTROPY & STATS:
        tl.store(state + WEIGHTED * row, tl.sum(weighted, 0), mask=inside)
    if LOG_SUM_SQ_PROBS & STATS:
        tl.store(state + SQUARES * row, tl.sum(squares, 0), mask=inside)
    if MEAN_LOGITS & STATS:
        tl.store(state + TOTAL * row, tl.sum(total, 0) * rate, mask=inside)
    if HIGHEST & STATS:
        # A maximum leaves NaNs out, and nothing is on top of one; it is in the sum.
        nan = s - s
        if TOP2_MARGIN & STATS:
            _, of_row = tl.reduce((best, second), 0, top2)
            tl.store(state + SECOND * row, of_row.to(tl.float64) * rate, mask=inside)
            # The sum is also NaN where a logit is +inf, which has a margin.
            nan = tl.where(of_row == of_row, 0.0, of_row).to(tl.float64)
        tl.store(state + BEFORE * row, tl.max(before, 0).to(tl.float64) * rate + nan, mask=inside)
        tl.store(state + AFTER * row, tl.max(after, 0).to(tl.float64) * rate + nan, mask=inside)

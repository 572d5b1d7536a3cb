"""The row pass over a tile of logits that a library product just wrote, and the gradient of such a tile.

A row's state is carried from tile to tile; within one, sums are kept per lane and reduced once, at the row's anchor, so
there is no running maximum: per logit it is a subtraction, a multiplication, an exponential and an addition. The label
is kept out of the sums by giving its block, and the last one, a masked pass of their own. A row whose logits lie far
above its anchor is done again, raised to its maximum, while the tile is still in the cache.

The order of a row's sums depends on the tiles' columns alone: not on what else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.linear import ENTROPY_LIMIT, LIMIT
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import accumulator, dense, exp, join, power, power_rate, split, tanh
from fastpref_kernels.triton.launch import launch
from fastpref_kernels.triton.logprobs import ENTROPY, LOG_SUM_SQ, MEAN, TOP1, _alignment
from fastpref_kernels.triton.logprobs_backward import one_minus_exp

# Stands in for log 0, so that 0 * log 0 is 0.
FLOOR: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def _load(row, bias, k, mask, inner, CAP: tl.constexpr, ACC: tl.constexpr):
    """u = x + bias, or tanh((x + bias) * inner): what is left of the transform is one factor, z = rate * u."""
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
    """e * dz/dx."""
    if CAP:
        return e * (slope * (1.0 - u * u))
    else:
        return e * slope


@triton.jit
def _masked(
    row, bias, to, k, C, own, anchor, rate, inner, slope,
    total, rest, weighted, squares, STATS: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add a block that holds the label, the row's end or logits of -inf. Returns u and which of it counts, too."""
    keep = (k < C) & (k != own)
    u = _load(row, bias, k, k < C, inner, CAP, ACC)
    if MEAN & STATS:
        total += tl.where(k < C, u, 0.0)
    d = (u * rate - anchor) * power_rate(1.0, ACC)
    e = tl.where(keep, power(d, ACC), 0.0)
    rest += e
    if ENTROPY & STATS:
        # A NaN that the floor swallows is in e.
        weighted += e * tl.where(keep, tl.maximum(d, FLOOR), 0.0)
    if LOG_SUM_SQ & STATS:
        squares += e * e
    if to is not None:
        value = tl.where(keep, _stored(e, u, slope, CAP), 0.0)
        tl.store(to + k, value.to(to.dtype.element_ty), mask=k < C)
    return u, keep, total, rest, weighted, squares


# What changes from tile to tile and from batch to batch: a new value must not be a new kernel. The alignment of rows is
# ALIGN's, STORE_ALIGN's and OUT_ALIGN's to say; what a row has one of begins anywhere.
LENGTHS = ["C", "column", "stride_z", "stride_store", "state_row", "state_r", "stride_anchors", "stride_masses"]
PER_ROW = ["targets", "state", "anchors", "masses"]


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=PER_ROW)
def fold_kernel(
    z, bias, targets, state, anchors, masses, store,  # (R, C), (C,), (R,), (8, R), (R,), (R,), (R, C)
    C, column, stride_z, stride_store, state_row, state_r, stride_anchors, stride_masses,
    rate_high, rate_low, inner_high, inner_low, slope_high, slope_low,
    LIMIT: tl.constexpr, STATS: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    STORE_ALIGN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program r adds row r of the tile to its state, and raises its anchor where the sum would reach LIMIT."""
    r = tl.program_id(0).to(tl.int64)
    rate = join(rate_high, rate_low, ACC)
    inner = join(inner_high, inner_low, ACC)
    slope = join(slope_high, slope_low, ACC)
    unit = power_rate(1.0, ACC)
    minus_inf = -float("inf")

    row = z + tl.multiple_of(r * stride_z, ALIGN)
    to = store
    if store is not None:
        to = store + tl.multiple_of(r * stride_store, STORE_ALIGN)
    state += r * state_r
    anchor = tl.load(state).to(ACC)
    local = (tl.load(targets + r) - column).to(tl.int32)
    inside = (local >= 0) & (local < C)
    own = tl.where(inside, local, -1)
    u_y = _load(row, bias, own, inside, inner, CAP, ACC)
    tl.store(state + 7 * state_row.to(tl.int64), (u_y * rate).to(tl.float64), mask=inside)
    full = C // BLOCK
    blocks = tl.cdiv(C, BLOCK)
    special = tl.where(inside, own // BLOCK, full)

    rest = tl.zeros((BLOCK,), ACC)
    weighted = tl.zeros((BLOCK,), ACC)
    squares = tl.zeros((BLOCK,), ACC)
    total = tl.zeros((BLOCK,), ACC)
    before = tl.full((), minus_inf, ACC)
    after = tl.full((), minus_inf, ACC)
    # Full blocks before the label's, then those after it: nothing is masked, nothing is compared.
    for side in range(0, 2):
        begin = tl.where(side == 0, 0, special + 1)
        end = tl.where(side == 0, tl.minimum(special, full), full)
        top = tl.full((BLOCK,), minus_inf, ACC)
        for block in tl.range(begin, end, num_stages=STAGES):
            k = block * BLOCK + tl.arange(0, BLOCK)
            u = _load(row, bias, k, None, inner, CAP, ACC)
            d = (u * rate - anchor) * unit
            e = power(d, ACC)
            rest += e
            if ENTROPY & STATS:
                weighted += e * d  # NaN where 0 * -inf, which is looked for afterwards
            if LOG_SUM_SQ & STATS:
                squares += e * e
            if MEAN & STATS:
                total += u
            if TOP1 & STATS:
                top = tl.maximum(top, u)
            if store is not None:
                tl.store(to + k, _stored(e, u, slope, CAP).to(store.dtype.element_ty))
        if TOP1 & STATS:
            # A label in another tile has all of this one's columns on one side.
            peak = tl.max(top)
            left = (side == 0) & (local >= 0)
            before = tl.maximum(before, tl.where(left, peak, minus_inf))
            after = tl.maximum(after, tl.where(left, minus_inf, peak))
    # The label's block and the last, which may be the same one.
    for block in range(special, blocks, tl.maximum(full - special, 1)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        u, keep, total, rest, weighted, squares = _masked(
            row, bias, to, k, C, own, anchor, rate, inner, slope, total, rest, weighted, squares, STATS, CAP, ACC
        )
        if TOP1 & STATS:
            before = tl.maximum(before, tl.max(tl.where(keep & (k < local), u, minus_inf)))
            after = tl.maximum(after, tl.max(tl.where(keep & (k > local), u, minus_inf)))

    s = tl.sum(rest)
    w = tl.sum(weighted)
    q = tl.sum(squares)
    t = tl.sum(total)
    old_rest = tl.load(state + state_row)
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
            u = _load(row, bias, k, k < C, inner, CAP, ACC)
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
        tl.debug_barrier()  # what was stored above is stored again, by other threads
        for block in range(0, blocks):
            k = block * BLOCK + tl.arange(0, BLOCK)
            u, keep, total, rest, weighted, squares = _masked(
                row, bias, to, k, C, own, anchor, rate, inner, slope, total, rest, weighted, squares, STATS, CAP, ACC
            )
        s = tl.sum(rest)
        w = tl.sum(weighted)
        q = tl.sum(squares)

    mass = s.to(tl.float64)
    tl.store(anchors + r * stride_anchors, new_anchor)
    tl.store(masses + r * stride_masses, mass)
    tl.store(state, new_anchor)
    new_rest = factor * old_rest + mass
    tl.store(state + state_row, new_rest)
    if ENTROPY & STATS:
        at = state + 2 * state_row.to(tl.int64)
        # From powers of 2, where they are that, to nats.
        tl.store(at, factor * (tl.load(at) + gap * old_rest) + w.to(tl.float64) / tl.full((), unit, tl.float64))
    if LOG_SUM_SQ & STATS:
        at = state + 3 * state_row.to(tl.int64)
        tl.store(at, factor * factor * tl.load(at) + q.to(tl.float64))
    if MEAN & STATS:
        at = state + 4 * state_row.to(tl.int64)
        tl.store(at, tl.load(at) + t.to(tl.float64) * rate.to(tl.float64))
    if TOP1 & STATS:
        # A maximum leaves NaNs out, and nothing is on top of one; it is in the sum.
        nan = new_rest - new_rest
        at = state + 5 * state_row.to(tl.int64)
        tl.store(at, tl.maximum(tl.load(at), (before * rate).to(tl.float64)) + nan)
        at += state_row
        tl.store(at, tl.maximum(tl.load(at), (after * rate).to(tl.float64)) + nan)


@triton.jit(
    do_not_specialize=["C", "column", "stride_z", "stride_out", "norm_row"],
    do_not_specialize_on_alignment=["targets", "norm", "grad", "grad_entropy", "pick", "count"],
)
def fold_backward_kernel(
    out, z, bias, targets, norm, grad, grad_entropy,  # (R, C), (R, C), (C,), (R,), (3 or 4, R), (R,), (R,)
    pick, count,  # (R,), (1,)
    C, column, stride_z, stride_out, norm_row,
    rate_high, rate_low, inner_high, inner_low, slope_high, slope_low,
    CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program r writes the gradient of row r of the tile, which belongs to row pick[r]. `out` may be `z`."""
    r = tl.program_id(0).to(tl.int64)
    row = z + tl.multiple_of(r * stride_z, ALIGN)
    to = out + tl.multiple_of(r * stride_out, OUT_ALIGN)
    if pick is not None:
        if r >= tl.load(count):
            return
        r = tl.load(pick + r)
    rate = join(rate_high, rate_low, ACC)
    inner = join(inner_high, inner_low, ACC)
    slope = join(slope_high, slope_low, ACC)

    anchor = tl.load(norm + r).to(ACC)
    inverse = tl.load(norm + norm_row + r).to(ACC)
    logp = tl.load(norm + 2 * norm_row.to(tl.int64) + r).to(ACC)
    g = tl.zeros((), ACC)
    if grad is not None:
        g += tl.load(grad + r).to(ACC)
    h = g
    surprise = g
    if grad_entropy is not None:
        h = tl.load(grad_entropy + r).to(ACC)
        entropy = tl.load(norm + 3 * norm_row.to(tl.int64) + r).to(ACC)
        surprise = tl.log(inverse) + entropy
    target = tl.load(targets + r)
    inside = (target >= column) & (target < column + C)
    own = tl.where(inside, target - column, 0).to(tl.int32)
    steepness = slope
    if CAP:
        u_y = _load(row, bias, own, inside, inner, CAP, ACC)
        steepness *= 1.0 - u_y * u_y
        tl.debug_barrier()  # in place, no thread may write before every thread has the label's logit
    factor = -inverse * slope
    if grad_entropy is None:
        factor *= g
    full = C // BLOCK
    for block in tl.range(0, full, num_stages=STAGES):
        k = block * BLOCK + tl.arange(0, BLOCK)
        u = _load(row, bias, k, None, inner, CAP, ACC)
        value = _gradient(u, anchor, factor, rate, g, h, surprise, grad_entropy is not None, CAP, ACC)
        tl.store(to + k, value.to(out.dtype.element_ty))
    if full * BLOCK < C:
        k = full * BLOCK + tl.arange(0, BLOCK)
        u = _load(row, bias, k, k < C, inner, CAP, ACC)
        value = _gradient(u, anchor, factor, rate, g, h, surprise, grad_entropy is not None, CAP, ACC)
        tl.store(to + k, value.to(out.dtype.element_ty), mask=k < C)
    value = g * one_minus_exp(logp, ACC)
    if grad_entropy is not None:
        p = exp(logp, ACC)
        value -= tl.where(p == 0.0, 0.0, h * p * (logp + entropy))
    value *= steepness
    tl.debug_barrier()  # the label's gradient goes over what its block wrote there
    tl.store(to + own, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    u, anchor, factor, rate, g, h, surprise, WITH_ENTROPY: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr
):
    """-p * (g + h * (log p + entropy)) * dz/dx, with 1/S, the slope and, where it is all there is, g in `factor`."""
    d = u * rate - anchor
    value = power(d * power_rate(1.0, ACC), ACC) * factor
    if WITH_ENTROPY:
        value *= g + h * (tl.maximum(d, FLOOR) + surprise)
    if CAP:
        value *= 1.0 - u * u
    return value


def _transform(logit_scale: float, temperature: float, softcap: float | None) -> tuple[float, float, float]:
    """rate, inner, slope: z = rate * u, u = x or tanh(inner * x), slope = dz/dx at 0."""
    if softcap is None:
        return logit_scale / temperature, 1.0, logit_scale / temperature
    return softcap / temperature, logit_scale / softcap, logit_scale / temperature


def fold(
    z: Tensor, bias: Tensor | None, targets: Tensor, column: int, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, state: Tensor, anchors: Tensor, masses: Tensor, store: Tensor | None,
) -> None:  # fmt: skip
    """Add a tile of products to its rows' state, and store what the gradient's products need of it.

    z (R, C) holds columns [column, column + C) of hidden @ weight.T; state (8, R) float64 is, over the columns so far,
    the anchor a; of d = z - a over columns but the target, the sums of exp(d), exp(d)*d and exp(2d); the sum of z over
    all columns; the maxima of z before and after the target; and z of the target. The third to the seventh are kept
    where `stats` asks for them.
    anchors and masses (R,) float64 receive this tile's anchor and sum of exp(d), store (R, C) exp(d) * dz/dx.
    """
    R, C = z.shape
    if R == 0:
        return
    rate, inner, slope = _transform(logit_scale, temperature, softcap)
    block, warps, stages = launches.ROWS["fold", z.element_size()]
    to = z if store is None else store
    launch(
        fold_kernel, R, z, *dense(bias, targets), state, anchors, masses, store,
        C, column, z.stride(0), to.stride(0), *state.stride(), anchors.stride(0), masses.stride(0),
        *split(rate, inner, slope),
        LIMIT=ENTROPY_LIMIT if stats & ENTROPY.value else LIMIT, STATS=stats, CAP=softcap is not None,
        ACC=accumulator(z.dtype),
        ALIGN=_alignment(z, z.stride(0)),
        STORE_ALIGN=_alignment(to, to.stride(0)),
        BLOCK=block, STAGES=stages, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


def fold_backward(
    z: Tensor, bias: Tensor | None, targets: Tensor, column: int, logit_scale: float, temperature: float,
    softcap: float | None, norm: Tensor, grad: Tensor | None, grad_entropy: Tensor | None, out: Tensor,
    pick: Tensor | None = None, count: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradient of a tile of products to `out`, which may be the tile itself.

    norm (3 or 4, R) holds the anchor, 1/S, logp and, where grad_entropy is given, the entropy.

    Where pick (R,) int64 and count (1,) are given, row i of the tile belongs to row pick[i] of targets, norm and the
    gradients, and only the first `count` rows of the tile are read and written.
    """
    R, C = z.shape
    if R == 0:
        return
    rate, inner, slope = _transform(logit_scale, temperature, softcap)
    block, warps, stages = launches.ROWS["fold_backward", z.element_size()]
    norm = norm.contiguous()
    launch(
        fold_backward_kernel, R, out, z, *dense(bias, targets), norm, *dense(grad, grad_entropy), pick, count,
        C, column, z.stride(0), out.stride(0), norm.stride(0), *split(rate, inner, slope),
        CAP=softcap is not None, ACC=accumulator(z.dtype),
        ALIGN=_alignment(z, z.stride(0)),
        OUT_ALIGN=_alignment(out, out.stride(0)),
        BLOCK=block, STAGES=stages, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip

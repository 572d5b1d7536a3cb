"""The product hidden @ weight.T and the fold of its logits in one kernel: no tile of logits is ever in memory.

A program multiplies a block of rows by a block of columns, then folds the block while it is in registers: the label is
taken out of it, exponentials are taken at the row's anchor, and a row whose sum in this block is too large for that is
anchored at its maximum in the block instead. What each block found of each row goes to memory of its own, and a second
kernel adds the blocks up, in float64 and in the order of the columns.

A row's bits depend on the blocks' size alone. Where a row needs another anchor, or has its label in the block, all rows
of the block go that way; but of each row is kept only what it needs itself.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.linear import COLUMNS, ENTROPY_LIMIT, LIMIT
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import LOG2E, dense, join, on_device, split, tanh
from fastpref_kernels.triton.linear import FLOOR, _transform
from fastpref_kernels.triton.logprobs import ENTROPY, LOG_SUM_SQ, MEAN, TOP1, _alignment

# How many numbers a statistic takes of every row and block, beside the anchor and the mass.
PLANES = {ENTROPY.value: 1, LOG_SUM_SQ.value: 1, MEAN.value: 1, TOP1.value: 2}


@functools.cache
def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


@triton.jit
def _piece(u, i: tl.constexpr, SPLITS: tl.constexpr):
    """The i-th of 2^SPLITS stretches of a block's columns, in the registers that it is in."""
    for level in tl.static_range(SPLITS):
        left, right = tl.split(tl.permute(tl.reshape(u, (u.shape[0], 2, u.shape[1] // 2)), (0, 2, 1)))
        if (i >> (SPLITS - 1 - level)) & 1:
            u = right
        else:
            u = left
    return u


@triton.jit
def _row_sum(u, SPLITS: tl.constexpr):
    """Each row's sum."""
    total = tl.zeros((u.shape[0],), tl.float32)
    for i in tl.static_range(1 << SPLITS):
        total += tl.sum(_piece(u, i, SPLITS), 1)
    return total


@triton.jit
def _row_max(u, SPLITS: tl.constexpr):
    """Each row's maximum."""
    top = tl.full((u.shape[0],), -float("inf"), tl.float32)
    for i in tl.static_range(1 << SPLITS):
        top = tl.maximum(top, tl.max(_piece(u, i, SPLITS), 1))
    return top


@triton.jit
def _around(u, local, SPLITS: tl.constexpr):
    """Of each row, u in column `local`, 0 where it is elsewhere, and the maxima of u before and after it."""
    minus_inf = -float("inf")
    own = tl.zeros((u.shape[0],), tl.float32)
    before = tl.full((u.shape[0],), minus_inf, tl.float32)
    after = before
    width: tl.constexpr = u.shape[1] >> SPLITS
    for i in tl.static_range(1 << SPLITS):
        piece = _piece(u, i, SPLITS)
        c = tl.arange(0, width)[None, :]
        y = (local - i * width)[:, None]
        own += tl.sum(tl.where(c == y, piece, 0.0), 1)
        before = tl.maximum(before, tl.max(tl.where(c < y, piece, minus_inf), 1))
        after = tl.maximum(after, tl.max(tl.where(c > y, piece, minus_inf), 1))
    return own, before, after


@triton.jit
def _sums(
    u, anchor, rate, slope, to, counted, end, STATS: tl.constexpr, CAP: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Each row's sums of exp(d), of it times d/ln 2 and of exp(2d), d = u * rate - anchor; stores exp(d) * dz/dx.

    `to` is where the first column goes, of rows that are `counted` and of columns before `end`, if anything is stored.
    """
    rest = tl.zeros((u.shape[0],), tl.float32)
    weighted = rest
    squares = rest
    width: tl.constexpr = u.shape[1] >> SPLITS
    for i in tl.static_range(1 << SPLITS):
        piece = _piece(u, i, SPLITS)
        # Fused by name: a product that both calls of this share would be kept in registers from the one to the other.
        d = tl.fma(piece, rate, -anchor[:, None]) * LOG2E
        e = tl.exp2(d)
        rest += tl.sum(e, 1)
        if ENTROPY & STATS:
            # 0 * log 0 is 0. A NaN that the floor swallows is in e.
            weighted += tl.sum(e * tl.maximum(d, FLOOR), 1)
        if LOG_SUM_SQ & STATS:
            squares += tl.sum(e * e, 1)
        if to is not None:
            if CAP:
                # Where u is -inf, e is 0.
                piece = tl.maximum(piece, -1.0)
                value = (e * (slope * (1.0 - piece * piece))).to(to.dtype.element_ty)
            else:
                value = (e * slope).to(to.dtype.element_ty)
            c = tl.arange(0, width)[None, :]
            at = (to + i * width)[:, None] + c
            if end >= (i + 1) * width:
                tl.store(at, value, mask=counted[:, None])
            else:
                tl.store(at, value, mask=counted[:, None] & (c < end - i * width))
    return rest, weighted, squares


@triton.jit(do_not_specialize=["R", "V"], do_not_specialize_on_alignment=["targets", "state", "partials"])
def product_fold_kernel(
    x, weight, bias, targets, state, partials, store,  # (R, H), (V, H), (V,), (R,), (8, R), (planes, blocks, R), (R, V)
    R, V, H, stride_x, stride_xh, stride_w, stride_wh, stride_store,
    rate_high, rate_low, inner_high, inner_low, slope_high, slope_low,
    LIMIT: tl.constexpr, STATS: tl.constexpr, CAP: tl.constexpr, ALIGN: tl.constexpr, STORE_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """A program folds a block of rows by columns. EVEN: BLOCK_K divides H."""
    rate = join(rate_high, rate_low, tl.float32)
    inner = join(inner_high, inner_low, tl.float32)
    slope = join(slope_high, slope_low, tl.float32)
    minus_inf = -float("inf")

    # GROUP_M blocks of rows go over the columns side by side.
    blocks = tl.cdiv(V, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks)
    within = tl.program_id(0) % (GROUP_M * blocks)
    height = tl.minimum(tl.cdiv(R, BLOCK_M) - group * GROUP_M, GROUP_M)
    r = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = within // height
    k = block * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and columns past the end are copies of the last, which are left out below: nothing is masked in the loop.
    row = tl.minimum(r, R - 1).to(tl.int64)
    column = tl.minimum(k, V - 1).to(tl.int64)
    h = tl.arange(0, BLOCK_K)
    at_x = x + tl.multiple_of(row * stride_x, ALIGN)[:, None] + h.to(tl.int64)[None, :] * stride_xh
    at_w = weight + tl.multiple_of(column * stride_w, ALIGN)[None, :] + h.to(tl.int64)[:, None] * stride_wh
    step = tl.full((), BLOCK_K, tl.int64)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, H, BLOCK_K):
        if EVEN:
            a = tl.load(at_x)
            b = tl.load(at_w)
        else:
            a = tl.load(at_x, mask=(h < H - begin)[None, :], other=0.0)
            b = tl.load(at_w, mask=(h < H - begin)[:, None], other=0.0)
        u = tl.dot(a, b, u, input_precision="ieee")
        at_x += step * stride_xh
        at_w += step * stride_wh

    if bias is not None:
        u += tl.load(bias + column).to(tl.float32)[None, :]
    if CAP:
        u = tanh(u * inner, tl.float32)
    counted = r < R
    c = tl.arange(0, BLOCK_N)[None, :]
    end = V - block * BLOCK_N
    local = (tl.load(targets + r, mask=counted, other=-1) - block * BLOCK_N).to(tl.int32)
    own = (local >= 0) & (local < BLOCK_N)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if MEAN & STATS:
        if end < BLOCK_N:
            u = tl.where(c < end, u, 0.0)
        total = _row_sum(u, SPLITS)
    if end < BLOCK_N:
        u = tl.where(c < end, u, minus_inf)
    before = tl.full((BLOCK_M,), minus_inf, tl.float32)
    after = before
    # Few blocks have a label: the others pay for none.
    if tl.max(own.to(tl.int32), 0) > 0:
        u_y, before, after = _around(u, local, SPLITS)
        tl.store(state + 7 * R.to(tl.int64) + r, (u_y * rate).to(tl.float64), mask=own)
        u = tl.where(c != local[:, None], u, minus_inf)
    if TOP1 & STATS:
        top = _row_max(u, SPLITS)
        before = tl.where(own, before, tl.where(local < 0, minus_inf, top))
        after = tl.where(own, after, tl.where(local < 0, top, minus_inf))

    anchor = tl.load(state + r, mask=counted, other=float("inf")).to(tl.float32)
    to = store
    if store is not None:
        to = store + tl.multiple_of(row * stride_store, STORE_ALIGN) + block * BLOCK_N
    rest, weighted, squares = _sums(u, anchor, rate, slope, to, counted, end, STATS, CAP, SPLITS)
    # Written so that a NaN takes this way too: it then reaches the state by the sums themselves.
    fits = rest < LIMIT
    if tl.min(fits.to(tl.int32), 0) == 0:
        top = _row_max(u, SPLITS) * rate
        # Nothing but -inf: any anchor gives a sum of 0.
        raised = tl.where(top == minus_inf, 0.0, top)
        anchor = tl.where(fits, anchor, raised)
        tl.debug_barrier()  # what was stored above is stored again
        s, w, q = _sums(u, anchor, rate, slope, to, counted & (fits == 0), end, STATS, CAP, SPLITS)
        rest = tl.where(fits, rest, s)
        weighted = tl.where(fits, weighted, w)
        squares = tl.where(fits, squares, q)

    plane = blocks.to(tl.int64) * R
    at = partials + block.to(tl.int64) * R + r
    tl.store(at, anchor, mask=counted)
    at += plane
    tl.store(at, rest, mask=counted)
    if ENTROPY & STATS:
        at += plane
        tl.store(at, weighted, mask=counted)
    if LOG_SUM_SQ & STATS:
        at += plane
        tl.store(at, squares, mask=counted)
    if MEAN & STATS:
        at += plane
        tl.store(at, total, mask=counted)
    if TOP1 & STATS:
        at += plane
        tl.store(at, before, mask=counted)
        at += plane
        tl.store(at, after, mask=counted)


@triton.jit(do_not_specialize=["R", "blocks"], do_not_specialize_on_alignment=["state", "partials"])
def combine_kernel(
    state, partials,  # (8, R), (planes, blocks, R)
    R, blocks, rate_high, rate_low, STATS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program adds up all blocks of BLOCK_R rows, at the highest anchor of those that have anything to add."""
    rate = join(rate_high, rate_low, tl.float64)
    minus_inf = -float("inf")
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < R
    plane = blocks.to(tl.int64) * R
    state += r
    row = R.to(tl.int64)

    highest = tl.full((BLOCK_B, BLOCK_R), minus_inf, tl.float32)
    for first in range(0, blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        mask = (block < blocks)[:, None] & inside[None, :]
        at = partials + block.to(tl.int64)[:, None] * R + r[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        mass = tl.load(at + plane, mask=mask, other=0.0)
        highest = tl.maximum(highest, tl.where(mass != 0.0, a, minus_inf))
    anchor = tl.max(highest, 0).to(tl.float64)
    # Where nothing is summed, the label's own, unless that is of no number.
    old = tl.load(state, mask=inside, other=0.0)
    unanchored = (anchor == minus_inf) & (old == minus_inf)
    anchor = tl.where(anchor == minus_inf, tl.where(old > minus_inf, old, 0.0), anchor)

    rest = tl.zeros((BLOCK_B, BLOCK_R), tl.float64)
    weighted = tl.zeros((BLOCK_B, BLOCK_R), tl.float64)
    squares = tl.zeros((BLOCK_B, BLOCK_R), tl.float64)
    total = tl.zeros((BLOCK_B, BLOCK_R), tl.float64)
    before = tl.full((BLOCK_B, BLOCK_R), minus_inf, tl.float32)
    after = tl.full((BLOCK_B, BLOCK_R), minus_inf, tl.float32)
    for first in range(0, blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        mask = (block < blocks)[:, None] & inside[None, :]
        at = partials + block.to(tl.int64)[:, None] * R + r[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        mass = tl.load(at + plane, mask=mask, other=0.0)
        counts = mass != 0.0
        # A block without mass is anchored anywhere: where the row is, so that what was stored of it stays 0.
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
        if LOG_SUM_SQ & STATS:
            at += plane
            squares += factor * factor * tl.load(at, mask=mask, other=0.0).to(tl.float64)
        if MEAN & STATS:
            at += plane
            total += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        if TOP1 & STATS:
            at += plane
            before = tl.maximum(before, tl.load(at, mask=mask, other=minus_inf))
            at += plane
            after = tl.maximum(after, tl.load(at, mask=mask, other=minus_inf))

    s = tl.sum(rest, 0)
    # As a fold leaves it: a shard of nothing but -inf has no anchor for others to be brought to.
    tl.store(state, tl.where(unanchored, minus_inf, anchor), mask=inside)
    tl.store(state + row, s, mask=inside)
    if ENTROPY & STATS:
        tl.store(state + 2 * row, tl.sum(weighted, 0), mask=inside)
    if LOG_SUM_SQ & STATS:
        tl.store(state + 3 * row, tl.sum(squares, 0), mask=inside)
    if MEAN & STATS:
        tl.store(state + 4 * row, tl.sum(total, 0) * rate, mask=inside)
    if TOP1 & STATS:
        # A maximum leaves NaNs out, and nothing is on top of one; it is in the sum.
        nan = s - s
        tl.store(state + 5 * row, tl.max(before, 0).to(tl.float64) * rate + nan, mask=inside)
        tl.store(state + 6 * row, tl.max(after, 0).to(tl.float64) * rate + nan, mask=inside)


def product_fold(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, state: Tensor, store: Tensor | None,
) -> tuple[Tensor, Tensor, int] | None:  # fmt: skip
    """`fastpref_kernels.linear.Backend.product_fold`: None where `launches.PRODUCTS` has no launch for the shape."""
    (R, H), V = x.shape, weight.shape[0]
    chosen = launches.product_launch(_name(x.device), x.dtype, R, H, V)
    if chosen is None:
        return None
    block_m, block_n, block_k, group_m, stages, warps, width = chosen
    assert COLUMNS % block_n == 0
    rate, inner, slope = _transform(logit_scale, temperature, softcap)
    blocks = triton.cdiv(V, block_n)
    planes = 2 + sum(count for bit, count in PLANES.items() if stats & bit)
    partials = torch.empty((planes, blocks, R), dtype=torch.float32, device=x.device)
    block_b, block_r, combine_warps = launches.COMBINE
    to = x if store is None else store
    with on_device(x.device):
        product_fold_kernel[(triton.cdiv(R, block_m) * blocks,)](
            x, weight, *dense(bias, targets), state, partials, store,
            R, V, H, *x.stride(), *weight.stride(), to.stride(0), *split(rate), *split(inner), *split(slope),
            LIMIT=ENTROPY_LIMIT if stats & ENTROPY.value else LIMIT, STATS=stats, CAP=softcap is not None,
            ALIGN=_alignment(x.stride(0), weight.stride(0), itemsize=x.element_size()),
            STORE_ALIGN=_alignment(to.stride(0), itemsize=to.element_size()),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=group_m, EVEN=H % block_k == 0,
            SPLITS=(block_n // width).bit_length() - 1, num_stages=stages, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        combine_kernel[(triton.cdiv(R, block_r),)](
            state, partials, R, blocks, *split(rate),
            STATS=stats, BLOCK_B=block_b, BLOCK_R=block_r, num_warps=combine_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return partials[0], partials[1], block_n

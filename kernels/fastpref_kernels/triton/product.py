"""The product hidden @ weight.T and the fold of its logits in one kernel: no tile of logits is ever in memory.

A program multiplies a block of rows by a block of columns, then folds the block while it is in registers, a piece of
its columns at a time: the label is taken out, exponentials are taken at the row's anchor, and a row whose sum in this
piece is too large for that is anchored at its maximum in the piece instead. What each piece gives of each row goes to
memory of its own, and a second kernel adds the pieces up, in float64 and in the order of the columns.

A row's bits depend on the size of blocks and pieces alone. Where a row needs another anchor, or has its label in the
piece, all rows of the block go that way, but each row keeps only what it needs itself.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpref_kernels.linear import COLUMNS, ENTROPY_LIMIT, LIMIT
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import LOG2E, dense, join, on_device, split, tanh
from fastpref_kernels.triton.linear import FLOOR, _transform
from fastpref_kernels.triton.logprobs import ENTROPY, LOG_SUM_SQ, MEAN, TOP1, _alignment

# How many numbers a statistic takes of every row and piece, beside the anchor and the mass.
PLANES = {ENTROPY.value: 1, LOG_SUM_SQ.value: 1, MEAN.value: 1, TOP1.value: 2}


@functools.cache
def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


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
    if LOG_SUM_SQ & STATS:
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
def _fold(
    u, r, first, target, anchor, bias, state, partials, store, R, V, stride_store, rate, inner, slope,
    LIMIT: tl.constexpr, STATS: tl.constexpr, CAP: tl.constexpr, STORE_ALIGN: tl.constexpr,
):  # fmt: skip
    """Fold products u of rows r and of columns from `first` on, which are 0 past the last column."""
    minus_inf = -float("inf")
    width: tl.constexpr = u.shape[1]
    c = tl.arange(0, width)
    end = V - first
    counted = r < tl.where(end > 0, R, 0)  # the last block may have pieces past the last column
    if bias is not None:
        u += tl.load(bias + first + c, mask=c < end, other=0.0).to(tl.float32)[None, :]
    if CAP:
        u = tanh(u * inner, tl.float32)
    total = tl.sum(u, 1) if MEAN & STATS else anchor
    if end < width:
        u = tl.where((c < end)[None, :], u, minus_inf)
    local = (target - first).to(tl.int32)
    before = anchor
    after = anchor
    if TOP1 & STATS:
        before = tl.max(tl.where(c[None, :] < local[:, None], u, minus_inf), 1)
        after = tl.max(tl.where(c[None, :] > local[:, None], u, minus_inf), 1)
    # Few pieces have a label: the others pay for none.
    own = (local >= 0) & (local < width)
    if tl.max(own.to(tl.int32), 0) > 0:
        label = c[None, :] == local[:, None]
        u_y = tl.sum(tl.where(label, u, 0.0), 1)
        tl.store(state + 7 * R.to(tl.int64) + r, (u_y * rate).to(tl.float64), mask=own)
        u = tl.where(label, minus_inf, u)

    to = store
    if store is not None:
        to = store + tl.multiple_of(r.to(tl.int64) * stride_store, STORE_ALIGN) + first
    rest, weighted, squares = _sums(u, anchor, rate, slope, to, counted, end, STATS, CAP)
    # Written so that a NaN takes this way too: it then reaches the state by the sums themselves.
    fits = rest < LIMIT
    if tl.min(fits.to(tl.int32), 0) == 0:
        top = tl.max(u, 1) * rate
        # Nothing but -inf: any anchor gives a sum of 0.
        anchor = tl.where(fits, anchor, tl.where(top == minus_inf, 0.0, top))
        tl.debug_barrier()  # what was stored above is stored again
        s, w, q = _sums(u, anchor, rate, slope, to, counted & (fits == 0), end, STATS, CAP)
        rest = tl.where(fits, rest, s)
        weighted = tl.where(fits, weighted, w)
        squares = tl.where(fits, squares, q)

    plane = tl.cdiv(V, width).to(tl.int64) * R
    at = partials + (first // width).to(tl.int64) * R + r
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


@triton.jit(do_not_specialize=["R", "V"], do_not_specialize_on_alignment=["targets", "state", "partials"])
def product_fold_kernel(
    x, weight, bias, targets, state, partials, store,  # (R, H), (V, H), (V,), (R,), (8, R), (planes, pieces, R), (R, V)
    R, V, H, stride_x, stride_xh, stride_w, stride_wh, stride_store,
    rate_high, rate_low, inner_high, inner_low, slope_high, slope_low,
    LIMIT: tl.constexpr, STATS: tl.constexpr, CAP: tl.constexpr, STORE_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALVINGS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A program folds a block of rows by columns. DESCRIBED: x and weight are tensor descriptors."""
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
    anchor = tl.load(state + r, mask=r < R, other=float("inf")).to(tl.float32)
    rate = join(rate_high, rate_low, tl.float32)
    inner = join(inner_high, inner_low, tl.float32)
    slope = join(slope_high, slope_low, tl.float32)
    width: tl.constexpr = BLOCK_N >> HALVINGS
    for i in tl.static_range(1 << HALVINGS):
        _fold(
            _piece(product, i, HALVINGS), r, column + i * width, target, anchor, bias, state, partials, store,
            R, V, stride_store, rate, inner, slope, LIMIT, STATS, CAP, STORE_ALIGN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["R", "pieces"], do_not_specialize_on_alignment=["state", "partials"])
def combine_kernel(
    state, partials,  # (8, R), (planes, pieces, R)
    R, pieces, rate_high, rate_low, STATS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program adds up all pieces of BLOCK_R rows, at the highest anchor of those that have anything to add."""
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
    # A shard of nothing but -inf keeps -inf as its anchor, so that no other shard is rescaled to it.
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
    """Multiply and fold all columns, as `fastpref_kernels.linear.Backend.product_fold` says.

    Returns None where `launches.PRODUCTS` has no launch for the shape.
    """
    (R, H), V = x.shape, weight.shape[0]
    chosen = launches.product_launch(_name(x.device), x.dtype, R, H, V)
    if chosen is None:
        return None
    (block_m, block_n, block_k, group_m, stages, warps), width, described = chosen
    assert COLUMNS % block_n == 0
    rate, inner, slope = _transform(logit_scale, temperature, softcap)
    pieces = triton.cdiv(V, width)
    planes = 2 + sum(count for bit, count in PLANES.items() if stats & bit)
    partials = torch.empty((planes, pieces, R), dtype=torch.float32, device=x.device)
    block_p, block_r, combine_warps = launches.COMBINE
    to = x if store is None else store
    operands = [x, weight]
    if described := described and _fits_descriptor(x) and _fits_descriptor(weight):
        operands = [
            TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block, block_k])
            for matrix, block in ((x, block_m), (weight, block_n))
        ]
    with on_device(x.device):
        product_fold_kernel[(triton.cdiv(R, block_m) * triton.cdiv(V, block_n),)](
            *operands, *dense(bias, targets), state, partials, store,
            R, V, H, *x.stride(), *weight.stride(), to.stride(0), *split(rate, inner, slope),
            LIMIT=ENTROPY_LIMIT if stats & ENTROPY.value else LIMIT, STATS=stats, CAP=softcap is not None,
            STORE_ALIGN=_alignment(to, to.stride(0)),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=group_m,
            HALVINGS=(block_n // width).bit_length() - 1, DESCRIBED=described,
            num_stages=stages, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        combine_kernel[(triton.cdiv(R, block_r),)](
            state, partials, R, pieces, *split(rate),
            STATS=stats, BLOCK_P=block_p, BLOCK_R=block_r, num_warps=combine_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return partials[0], partials[1], width


def _fits_descriptor(matrix: Tensor) -> bool:
    """Return whether a tensor descriptor can load blocks of a matrix: rows are dense, apart and begin at 16 bytes."""
    row, element = matrix.stride()
    aligned = matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0
    return aligned and element == 1 and row >= matrix.shape[1] and matrix.numel() > 0

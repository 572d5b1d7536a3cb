"""Operations on rows: a label's dot product, rows taken out and added back, and kept exponentials rescaled.

A program does one row. The operations are those of `fastpref_kernels.eager.linear`, without a read on the host and
without a temporary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.contract import widened
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import accumulator
from fastpref_kernels.triton.launch import launch

# A number that differs from batch to batch must not compile a new kernel. H and the strides depend on the model alone.
LENGTHS = ["M"]
# Factors that a program loads at a time.
PIECES: tl.constexpr = tl.constexpr(64)


@triton.jit(do_not_specialize_on_alignment=["labels", "out"])
def dot_kernel(
    out,  # (R,)
    x,  # (R, H)
    weight,  # (V, H)
    labels,  # (R,)
    H,
    stride_x,
    stride_xh,
    stride_w,
    stride_wh,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply row r of x by row labels[r] of weight, in program r."""
    r = tl.program_id(0).to(tl.int64)
    x += r * stride_x
    weight += tl.load(labels + r) * stride_w
    sums = tl.zeros((BLOCK,), ACC)
    for start in range(0, H, BLOCK):
        h = start + tl.arange(0, BLOCK)
        a = tl.load(x + h.to(tl.int64) * stride_xh, mask=h < H, other=0.0).to(ACC)
        sums += a * tl.load(weight + h.to(tl.int64) * stride_wh, mask=h < H, other=0.0).to(ACC)
    tl.store(out + r, tl.sum(sums))


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=["source", "scale"])
def gather_kernel(
    out,  # (R, H)
    x,  # (M, H)
    source,  # (R,)
    scale,  # (R,) or None
    M,
    H,
    stride_x,
    stride_xh,
    BLOCK: tl.constexpr,
):
    """Copy row source[r] of x, times scale[r], to row r of out, in program r; zeros where there is no such row."""
    r = tl.program_id(0).to(tl.int64)
    row = tl.load(source + r)
    x += row * stride_x
    there = tl.where(row < M, H, 0)
    for start in range(0, H, BLOCK):
        h = start + tl.arange(0, BLOCK)
        value = tl.load(x + h.to(tl.int64) * stride_xh, mask=h < there, other=0.0)
        if scale is not None:
            value = value.to(scale.dtype.element_ty) * tl.load(scale + r)
        tl.store(out + r * H + h, value.to(out.dtype.element_ty), mask=h < H)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=["source", "scale"])
def scatter_kernel(
    out,  # (M, H)
    rows,  # (R, H)
    source,  # (R,)
    scale,  # (R,) or None
    M,
    H,
    stride_out,
    stride_rows,
    BLOCK: tl.constexpr,
):
    """Add row r, times scale[r], to row source[r] of out, in program r, and round once. No two rows have one source."""
    r = tl.program_id(0).to(tl.int64)
    row = tl.load(source + r)
    if row < M:
        out += row * stride_out
        rows += r * stride_rows
        for start in range(0, H, BLOCK):
            h = start + tl.arange(0, BLOCK)
            value = tl.load(rows + h, mask=h < H, other=0.0)
            if scale is not None:
                value *= tl.load(scale + r)
            value += tl.load(out + h, mask=h < H, other=0.0).to(value.dtype)
            tl.store(out + h, value.to(out.dtype.element_ty), mask=h < H)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["factors"])
def rescale_kernel(
    kept,  # (R, V)
    factors,  # (pieces, R)
    R,
    V,
    pieces,
    columns,
    stride_kept,
    BLOCK: tl.constexpr,
):
    """Multiply each piece of row r by its factor, in program r, where that is not 1. Few rows have such a piece."""
    r = tl.program_id(0).to(tl.int64)
    moved = tl.zeros((PIECES,), tl.int32)
    for first in range(0, pieces, PIECES):
        p = first + tl.arange(0, PIECES)
        factor = tl.load(factors + p.to(tl.int64) * R + r, mask=p < pieces, other=1.0)
        moved |= (factor != 1.0).to(tl.int32)
    if tl.max(moved) != 0:
        kept += r * stride_kept
        for p in range(0, pieces):
            factor = tl.load(factors + tl.full((), p, tl.int64) * R + r)
            if factor != 1.0:
                begin = p * columns
                end = tl.minimum(begin + columns, V)
                for start in range(begin, end, BLOCK):
                    k = start + tl.arange(0, BLOCK)
                    e = tl.load(kept + k, mask=k < end, other=0.0).to(factor.dtype)
                    tl.store(kept + k, (e * factor).to(kept.dtype.element_ty), mask=k < end)


def dot(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Run `fastpref_kernels.eager.linear.dot`."""
    R, H = x.shape
    out = x.new_empty(R, dtype=widened(x.dtype))
    block, warps, _ = launches.SMALL["row_dot"]
    if R:
        given = (out, x, weight, labels, H, *x.stride(), *weight.stride())
        acc = accumulator(x.dtype)
        launch(dot_kernel, R, *given, ACC=acc, BLOCK=block, num_warps=warps, enable_fp_fusion=True)
    return out


def gather(x: Tensor, source: Tensor, scale: Tensor | None) -> Tensor:
    """Run `fastpref_kernels.eager.linear.gather`."""
    (M, H), R = x.shape, source.shape[0]
    out = x.new_empty((R, H))
    block, warps, _ = launches.SMALL["row_copy"]
    if R:
        given = (out, x, source, scale, M, H, *x.stride())
        launch(gather_kernel, R, *given, BLOCK=block, num_warps=warps, enable_fp_fusion=True)
    return out


def scatter(out: Tensor, source: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    """Run `fastpref_kernels.eager.linear.scatter`."""
    (M, H), R = out.shape, source.shape[0]
    block, warps, _ = launches.SMALL["row_copy"]
    if R:
        given = (out, rows, source, scale, M, H, out.stride(0), rows.stride(0))
        launch(scatter_kernel, R, *given, BLOCK=block, num_warps=warps, enable_fp_fusion=True)


def rescale(kept: Tensor, factors: Tensor, columns: int) -> None:
    """Run `fastpref_kernels.eager.linear.rescale`."""
    R, V = kept.shape
    factors = factors.to(widened(kept.dtype)).contiguous()
    block, warps, _ = launches.SMALL["row_copy"]
    if R:
        given = (kept, factors, R, V, len(factors), columns, kept.stride(0))
        launch(rescale_kernel, R, *given, BLOCK=block, num_warps=warps, enable_fp_fusion=True)

"""The gradient of log-probs where each tile of columns counts for some rows only.

Only the device knows which rows those are. Their indices, `pick`, are a permutation of all rows that begins with them,
and `count` is a tensor of one element. So the host launches programs for all rows and never waits for a number. A
program whose rows lie past the count returns at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton import launches
from fastpref_kernels.triton.launch import launch
from fastpref_kernels.triton.linear import fold_backward


@triton.jit(do_not_specialize_on_alignment=["pick", "count", "scale"])
def picked_product_kernel(
    out, a, b, pick, count, scale,  # (M, N), (M, K), (K, N), (R,), (1,), (R,)
    M, N, K,  # of M and K, the one that counts picked rows is None
    stride_om, stride_on, stride_am, stride_ak, stride_bk, stride_bn,
    A_PICKED: tl.constexpr, OUT_PICKED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write a block of out = a @ b, or add it to out, with float32 sums.

    Where M is None, row m of the product belongs to row pick[m], of a and of out where they are not compact, and is
    scaled by scale[pick[m]]. Where K is None, term k is of row pick[k] of b, and of column pick[k] of a where A_PICKED.
    """
    SUMMED: tl.constexpr = K is None
    if SUMMED:
        K = tl.load(count)
    else:
        M = tl.load(count)

    # GROUP_M blocks of rows go over the columns side by side, so that a cache holds what they share.
    blocks = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks)
    within = tl.program_id(0) % (GROUP_M * blocks)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    # Programs are launched for all rows, so a group of few rows has programs to spare, and past the last group all are.
    if within >= height * blocks:
        return
    m = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)

    row = m.to(tl.int64)
    if not SUMMED:
        row = tl.load(pick + m, mask=m < M, other=0).to(tl.int64)
    a_row = row if A_PICKED and not SUMMED else m.to(tl.int64)
    at_a = a + a_row[:, None] * stride_am
    at_b = b + n.to(tl.int64)[None, :] * stride_bn
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        a_k = k.to(tl.int64)
        b_k = a_k
        if SUMMED:
            b_k = tl.load(pick + k, mask=k < K, other=0).to(tl.int64)
            if A_PICKED:
                a_k = b_k
        left = tl.load(at_a + a_k[None, :] * stride_ak, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(at_b + b_k[:, None] * stride_bk, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        product = tl.dot(left, right, product, input_precision="ieee")

    if scale is not None:
        product *= tl.load(scale + row, mask=m < M, other=0.0)[:, None]
    out_row = row if OUT_PICKED else m.to(tl.int64)
    at = out + out_row[:, None] * stride_om + n[None, :] * stride_on
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        product += tl.load(at, mask=inside, other=0.0)
    tl.store(at, product.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["pick", "count", "scale"])
def picked_sums_kernel(
    out,  # (C,)
    tile,  # (R, C)
    pick,  # (R,)
    count,  # (1,)
    scale,  # (R,)
    C,
    stride_r,
    stride_c,
    PICKED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write or add the sums of BLOCK_C columns over the picked rows, each times its scale."""
    rows = tl.load(count)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for begin in range(0, rows, BLOCK_R):
        i = begin + tl.arange(0, BLOCK_R)
        r = tl.load(pick + i, mask=i < rows, other=0)
        at = tile + (r if PICKED else i.to(tl.int64))[:, None] * stride_r + c[None, :] * stride_c
        values = tl.load(at, mask=(i < rows)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        if scale is not None:
            values *= tl.load(scale + r, mask=i < rows, other=0.0)[:, None]
        sums += values
    total = tl.sum(sums, 0)
    if ADD:
        total += tl.load(out + c, mask=c < C, other=0.0)
    tl.store(out + c, total.to(out.dtype.element_ty), mask=c < C)


def _product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    pick: Tensor,
    count: Tensor,
    *,
    summed: bool = False,
    gather: bool = False,
    scatter: bool = False,
    add: bool = False,
    scale: Tensor | None = None,
) -> None:
    """Write out = a @ b, or add it to out, over the first `count` of the rows `pick`.

    Args:
        out: (M, N).
        a: (M, K), float16, bfloat16 or float32.
        b: (K, N), of the same dtype.
        pick: (R,) int64, indices of rows.
        count: (1,) on the device, how many of them there are.
        summed: whether the product sums over the picked rows: over the rows of b, and the columns of a. Else the picked
            rows are rows of the product.
        gather: whether a has all rows, and those picked are read; else it holds picked rows only, in their order.
        scatter: whether out has all rows, and those picked are written.
        add: whether the product is added to out.
        scale: (R,) or None, what multiplies each row of the product.
    """
    blocks = launches.PICKED[b.element_size()]
    rows = out.shape[0] if summed else len(pick)
    programs = triton.cdiv(rows, blocks.block_m) * triton.cdiv(out.shape[1], blocks.block_n)
    sizes = (rows if summed else None, out.shape[1], None if summed else b.shape[0])
    launch(
        picked_product_kernel,
        programs,
        *(out, a, b, pick, count, scale, *sizes, *out.stride(), *a.stride(), *b.stride()),
        A_PICKED=gather,
        OUT_PICKED=scatter,
        ADD=add,
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        GROUP_M=blocks.group_m,
        num_stages=blocks.stages,
        num_warps=blocks.warps,
        enable_fp_fusion=True,
    )


def filtered_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    keep: Tensor,
    columns: int,
    kept: Tensor | None,
    norm: Tensor,
    grad: Tensor,
    transform: tuple[float, float, float | None],
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    add: bool,
    scratch: Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor],
) -> bool:
    """Compute the gradients of some rows' log-probs from those tiles of columns that each row keeps.

    No value of the device is read on the host. Two calls on the same tensors give the same bits.

    Args:
        x: (R, H), contiguous, R > 0.
        weight: (V, H), of x's dtype.
        bias: (V,) or None.
        targets: (R,) the rows' labels.
        keep: (tiles, R) bool: whether a tile's gradient counts for a row.
        columns: columns of a tile.
        kept: (R, V) or None, what the forward kept: exp(z - anchor)·dz/dx, and its negative sum at the label.
        norm: (3, R) float32: anchor, 1/S and log-prob of each row.
        grad: (R,) float32, of the log-probs.
        transform: logit_scale, temperature and softcap of the logits.
        d_hidden: (R, H) float32 or None, in and out: the gradient is added to it.
        d_weight: (V, H) or None, out, or in and out. Where it is added to, it is float32.
        d_bias: (V,) or None, as `d_weight`.
        add: whether the gradients are added to d_weight and d_bias, or written over them.
        scratch: returns memory for a tile, as `Backend.scratch` does.

    Returns:
        Whether it was done: not for float64, which Triton 3.4 does not multiply.
    """
    if x.dtype == torch.float64:
        return False
    (R, vocabulary), right = (len(x), len(weight)), x
    # The rows that keep each tile come first, in their order.
    picks = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    counts = keep.sum(1, dtype=torch.int32)
    row_scale = None
    if kept is not None:
        row_scale = -grad * norm[1]
        right = (x.float() * row_scale[:, None]).to(x.dtype)
    for i, begin in enumerate(range(0, vocabulary, columns)):
        part = slice(begin, min(begin + columns, vocabulary))
        w, rows, gather = weight[part], (picks[i], counts[i : i + 1]), kept is not None
        if kept is not None:
            tile = kept[:, part]
        else:
            shape = (R, min(columns, vocabulary))
            z = scratch("logits", shape, torch.float32, x.device)[:, : len(w)]
            tile = z if x.dtype == z.dtype else scratch("gradient", shape, x.dtype, x.device)[:, : len(w)]
            _product(z, x, w.t(), *rows, gather=True)
            b = None if bias is None else bias[part]
            fold_backward(z, b, targets, begin, *transform, norm, grad, None, tile, *rows)
        if d_hidden is not None:
            _product(d_hidden, tile, w, *rows, gather=gather, scatter=True, add=True, scale=row_scale)
        if d_weight is not None:
            _product(d_weight[part], tile.t(), right, *rows, summed=True, gather=gather, add=add)
        if d_bias is not None:
            block_r, block_c, warps = launches.PICKED_SUMS
            launch(
                picked_sums_kernel,
                triton.cdiv(len(w), block_c),
                *(d_bias[part], tile, *rows, row_scale, len(w), *tile.stride()),
                PICKED=gather,
                ADD=add,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=warps,
                enable_fp_fusion=True,
            )
    return True

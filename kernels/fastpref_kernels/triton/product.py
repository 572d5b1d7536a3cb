"""Launch the product that folds its own logits."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpref_kernels.contract import COLUMNS, Statistic
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import alignment, dense, on_device, split
from fastpref_kernels.triton.linear import limit, transform_of
from fastpref_kernels.triton.product_forward import combine_kernel, product_fold_kernel

# How many numbers statistics take of every row and piece, beside the anchor and the mass.
PLANES = {
    Statistic.ENTROPY: 1,
    Statistic.LOG_SUM_SQ_PROBS: 1,
    Statistic.MEAN_LOGITS: 1,
    Statistic.IS_TOP1 | Statistic.TOP2_MARGIN: 2,
    Statistic.TOP2_MARGIN: 1,
}


@functools.cache
def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


def product_fold(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    stats: int,
    state: Tensor,
    store: Tensor | None,
) -> tuple[Tensor, Tensor, int] | None:
    """Multiply and fold all columns, as `fastpref_kernels.linear.Backend.product_fold` says.

    Returns None where `launches.PRODUCTS` has no launch for the shape.
    """
    (R, H), V = x.shape, weight.shape[0]
    chosen = launches.product_launch(_name(x.device), x.dtype, R, H, V)
    if chosen is None:
        return None
    blocks, width, described = chosen
    assert COLUMNS % blocks.block_n == 0
    rate, inner, slope = transform_of(logit_scale, temperature, softcap)
    pieces = triton.cdiv(V, width)
    planes = 2 + sum(count for bits, count in PLANES.items() if stats & bits)
    partials = torch.empty((planes, pieces, R), dtype=torch.float32, device=x.device)
    to = x if store is None else store
    operands = [x, weight]
    if described := described and _fits_descriptor(x) and _fits_descriptor(weight):
        operands = [
            TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block, blocks.block_k])
            for matrix, block in ((x, blocks.block_m), (weight, blocks.block_n))
        ]
    strides = (*x.stride(), *weight.stride(), to.stride(0))
    block_p, block_r, combine_warps = launches.COMBINE
    with on_device(x.device):
        product_fold_kernel[(triton.cdiv(R, blocks.block_m) * triton.cdiv(V, blocks.block_n),)](
            *(*operands, *dense(bias, targets), state, partials, store, R, V, H, *strides),
            *split(rate, inner, slope),
            LIMIT=limit(stats),
            STATS=stats,
            CAP=softcap is not None,
            STORE_ALIGN=alignment(to, to.stride(0)),
            BLOCK_M=blocks.block_m,
            BLOCK_N=blocks.block_n,
            BLOCK_K=blocks.block_k,
            GROUP_M=blocks.group_m,
            HALVINGS=(blocks.block_n // width).bit_length() - 1,
            DESCRIBED=described,
            num_stages=blocks.stages,
            num_warps=blocks.warps,
            enable_fp_fusion=True,
        )
        combine_kernel[(triton.cdiv(R, block_r),)](
            *(state, partials, R, pieces, *split(rate)),
            STATS=stats,
            BLOCK_P=block_p,
            BLOCK_R=block_r,
            num_warps=combine_warps,
            enable_fp_fusion=True,
        )
    return partials[0], partials[1], width


def _fits_descriptor(matrix: Tensor) -> bool:
    """Return whether a tensor descriptor can load blocks of a matrix: rows are dense, apart and begin at 16 bytes."""
    row, element = matrix.stride()
    aligned = matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0
    return aligned and element == 1 and row >= matrix.shape[1] and matrix.numel() > 0

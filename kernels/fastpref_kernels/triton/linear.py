"""Launch the row passes over tiles of logits from hidden states: the fold, and the gradient."""

from __future__ import annotations

from torch import Tensor

from fastpref_kernels.contract import ENTROPY_LIMIT, LIMIT, Statistic, Transform
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import accumulator, alignment, dense, split
from fastpref_kernels.triton.launch import launch
from fastpref_kernels.triton.linear_backward import fold_backward_kernel
from fastpref_kernels.triton.linear_forward import fold_kernel


def limit(stats: int) -> float:
    """Return the sum at which a row moves its anchor."""
    return ENTROPY_LIMIT if stats & Statistic.ENTROPY else LIMIT


def transform_of(logit_scale: float, temperature: float, softcap: float | None) -> tuple[float, float, float]:
    """Return rate, inner and slope: z = rate * u, u = x or tanh(inner * x), and slope = dz/dx at 0."""
    rate, inner, cap, slope = Transform.of(logit_scale, temperature, softcap)
    return rate if cap is None else cap * rate, inner, slope


def fold(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    column: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    stats: int,
    state: Tensor,
    anchors: Tensor,
    masses: Tensor,
    store: Tensor | None,
) -> None:
    """Add a tile of logits to the sums of its rows. The arguments are those of `fastpref_kernels.eager.linear.fold`.

    The sums that only statistics need are kept where `stats` asks for them.
    """
    R, C = z.shape
    if R == 0:
        return
    block, warps, stages = launches.ROWS["fold", z.element_size()]
    to = z if store is None else store
    strides = (z.stride(0), to.stride(0), *state.stride(), anchors.stride(0), masses.stride(0))
    launch(
        fold_kernel,
        R,
        *(z, *dense(bias, targets), state, anchors, masses, store, C, column, *strides),
        *split(*transform_of(logit_scale, temperature, softcap)),
        LIMIT=limit(stats),
        STATS=stats,
        CAP=softcap is not None,
        ACC=accumulator(z.dtype),
        ALIGN=alignment(z, z.stride(0)),
        STORE_ALIGN=alignment(to, to.stride(0)),
        BLOCK=block,
        STAGES=stages,
        num_warps=warps,
        enable_fp_fusion=True,
    )


def fold_backward(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    column: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    norm: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    pick: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Write the gradient of a tile of logits to `out`, which may be the tile itself.

    The arguments are those of `fastpref_kernels.eager.linear.fold_backward`, and two more. With `pick` (R,) int64 and
    `count` (1,), row i of the tile belongs to row pick[i] of targets, norm and the gradients, and only the first
    `count` rows of the tile are read and written.
    """
    R, C = z.shape
    if R == 0:
        return
    block, warps, stages = launches.ROWS["fold_backward", z.element_size()]
    norm = norm.contiguous()
    strides = (z.stride(0), out.stride(0), norm.stride(0))
    launch(
        fold_backward_kernel,
        R,
        *(out, z, *dense(bias, targets), norm, *dense(grad, grad_entropy), pick, count, C, column, *strides),
        *split(*transform_of(logit_scale, temperature, softcap)),
        CAP=softcap is not None,
        ACC=accumulator(z.dtype),
        ALIGN=alignment(z, z.stride(0)),
        OUT_ALIGN=alignment(out, out.stride(0)),
        BLOCK=block,
        STAGES=stages,
        num_warps=warps,
        enable_fp_fusion=True,
    )

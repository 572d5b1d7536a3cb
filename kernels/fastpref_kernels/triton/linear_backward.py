"""The gradient of a tile of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from fastpref_kernels.triton.common import exp, join, power, power_rate
from fastpref_kernels.triton.constants import FLOOR
from fastpref_kernels.triton.linear_forward import load_u
from fastpref_kernels.triton.logprobs_backward import one_minus_exp


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
        u_y = load_u(row, bias, own, inside, inner, CAP, ACC)
        steepness *= 1.0 - u_y * u_y
        tl.debug_barrier()  # in place, no thread may write before every thread has the label's logit
    factor = -inverse * slope
    if grad_entropy is None:
        factor *= g
    full = C // BLOCK
    for block in tl.range(0, full, num_stages=STAGES):
        k = block * BLOCK + tl.arange(0, BLOCK)
        u = load_u(row, bias, k, None, inner, CAP, ACC)
        value = _gradient(u, anchor, factor, rate, g, h, surprise, grad_entropy is not None, CAP, ACC)
        tl.store(to + k, value.to(out.dtype.element_ty))
    if full * BLOCK < C:
        k = full * BLOCK + tl.arange(0, BLOCK)
        u = load_u(row, bias, k, k < C, inner, CAP, ACC)
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
    """Return -p * (g + h * (log p + entropy)) * dz/dx.

    `factor` holds 1/S and the slope, and also g where the entropy has no gradient.
    """
    d = u * rate - anchor
    value = power(d * power_rate(1.0, ACC), ACC) * factor
    if WITH_ENTROPY:
        value *= g + h * (tl.maximum(d, FLOOR) + surprise)
    if CAP:
        value *= 1.0 - u * u
    return value

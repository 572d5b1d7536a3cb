"""The gradient of logits, from the gradients of their labels' log-probs and of the entropies."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastpref_kernels.triton.common import exp, join, power, power_rate
from fastpref_kernels.triton.constants import FLOOR
from fastpref_kernels.triton.logprobs_rows import LENGTHS, SMALL_TENSORS, Batch, locate, squash


class Gradient(NamedTuple):
    """The numbers of a row that the gradient of each of its logits is made of.

    Attributes:
        anchor: u at which `factor`'s sum is anchored.
        factor: -slope/S, times g if neither a cap nor the entropy's gradient needs g apart.
        rate, inner, cap: the transform of the logits.
        g: the gradient of the log-prob.
        h: the gradient of the entropy.
        surprise: log(1/S) + entropy.
    """

    anchor: Any
    factor: Any
    rate: Any
    inner: Any
    cap: Any
    g: Any
    h: Any
    surprise: Any


@triton.jit(
    do_not_specialize=[*LENGTHS, "tokens", "out_b"],
    do_not_specialize_on_alignment=[*SMALL_TENSORS, "grad", "grad_entropy", "counts"],
)
def logprobs_backward_kernel(
    out, grad, grad_entropy, logits, labels, cu_seqlens, weights,  # (B, T, V), (B, T') or (S,), (B, T'), ...
    norm, counts,  # (3 or 4, B, T'), (S,)
    V, tokens, rows, n_sequences, n_rows, programs,  # V, T, T', S, B*T'
    out_b, out_t, out_v, stride_b, stride_t, stride_v, stride_lb, stride_lt,
    ignore_index, rate_high, rate_low, inner_high, inner_low, cap_high, cap_low, slope_high, slope_low,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr, REDUCTION: tl.constexpr, GRAD: tl.constexpr,
    GRAD_ENTROPY: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of row q of (B, T). Programs q*programs to (q + 1)*programs - 1 share its blocks.

    The gradient of a row that is not scored is zeros. `out` may be the logits.
    """
    q = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    b = q // tokens
    t = q % tokens
    rate = join(rate_high, rate_low, ACC)
    inner = join(inner_high, inner_low, ACC)
    cap = join(cap_high, cap_low, ACC)
    slope = join(slope_high, slope_low, ACC)

    batch = Batch(labels, stride_lb, stride_lt, cu_seqlens, weights, n_sequences, rows, ignore_index)
    sequence, _, followed = locate(batch, b, t, SHIFT, PACKED)
    at = labels + b.to(tl.int64) * stride_lb + (t + SHIFT).to(tl.int64) * stride_lt
    label = tl.load(at, mask=t < rows, other=0)
    scored = followed & (t < rows) & (label != ignore_index)
    row = logits + tl.multiple_of(b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t, ALIGN)
    to = out + tl.multiple_of(b.to(tl.int64) * out_b + t.to(tl.int64) * out_t, OUT_ALIGN)

    blocks = tl.cdiv(V, BLOCK)
    share = tl.cdiv(blocks, programs)
    begin = part * share
    end = tl.minimum(begin + share, blocks)
    if scored:
        r = b.to(tl.int64) * rows + t
        anchor = tl.load(norm + r)
        inverse = tl.load(norm + n_rows + r)
        logp = tl.load(norm + 2 * n_rows.to(tl.int64) + r)
        g = tl.zeros((), ACC)
        if GRAD:
            if REDUCTION:
                g = tl.load(grad + sequence)
                if WEIGHTED:
                    g *= tl.load(weights + r).to(ACC)
                if REDUCTION == 2:
                    g /= tl.maximum(tl.load(counts + sequence), 1).to(ACC)
            else:
                g = tl.load(grad + r)
        h = g
        surprise = g
        if GRAD_ENTROPY:
            h = tl.load(grad_entropy + r)
            surprise = tl.log(inverse) + tl.load(norm + 3 * n_rows.to(tl.int64) + r)
        # The program that writes the label's block also reads the label's logit and writes its gradient: in place,
        # another program could overwrite the logit before it is read.
        own = tl.where((label >= begin.to(tl.int64) * BLOCK) & (label < tl.minimum(end * BLOCK, V)), label, -1)
        u_y = anchor
        if CAP:
            u_y = squash(tl.load(row + own * stride_v, mask=own >= 0, other=0.0), inner, cap, CAP, ACC)
            tl.debug_barrier()  # in place, no thread may write before every thread has the label's logit
        factor = -inverse * slope
        if not (GRAD_ENTROPY or CAP):
            factor *= g
        of_row = Gradient(anchor, factor, rate, inner, cap, g, h, surprise)
        full = V // BLOCK
        for i in tl.range(begin, tl.minimum(end, full), num_stages=STAGES):
            k = i * BLOCK + tl.arange(0, BLOCK)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            out_offset = k.to(tl.int64) * out_v if WIDE else k * out_v
            x = tl.load(row + offset)
            value = _gradient(x, of_row, GRAD_ENTROPY, CAP, ACC)
            tl.store(to + out_offset, value.to(out.dtype.element_ty))
        if (begin <= full) & (full < end):
            k = full * BLOCK + tl.arange(0, BLOCK)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            out_offset = k.to(tl.int64) * out_v if WIDE else k * out_v
            x = tl.load(row + offset, mask=k < V, other=0.0)
            value = _gradient(x, of_row, GRAD_ENTROPY, CAP, ACC)
            tl.store(to + out_offset, value.to(out.dtype.element_ty), mask=k < V)
        # 1 - p without cancellation: -expm1(logp) = p * s, and s = (1 - inverse) / inverse where anchored at the label.
        missing = one_minus_exp(logp, ACC)
        value = g * missing
        if GRAD_ENTROPY:
            p = exp(logp, ACC)
            value -= tl.where(p == 0.0, 0.0, h * p * (logp + surprise - tl.log(inverse)))
        value *= slope
        if CAP:
            value *= 1.0 - (u_y / cap) * (u_y / cap)
        tl.debug_barrier()  # the label's gradient goes over what its block wrote there
        tl.store(to + own * out_v, value.to(out.dtype.element_ty), mask=own >= 0)
    else:
        for block in range(begin, end):
            k = block * BLOCK + tl.arange(0, BLOCK)
            out_offset = k.to(tl.int64) * out_v if WIDE else k * out_v
            tl.store(to + out_offset, tl.zeros((BLOCK,), out.dtype.element_ty), mask=k < V)


@triton.jit
def _gradient(x, of_row, GRAD_ENTROPY: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr):
    """Return -p * slope * (g + h * (log p + entropy))."""
    u = squash(x, of_row.inner, of_row.cap, CAP, ACC)
    value = power((u - of_row.anchor) * power_rate(of_row.rate, ACC), ACC) * of_row.factor
    if GRAD_ENTROPY:
        value *= of_row.g + of_row.h * (tl.maximum((u - of_row.anchor) * of_row.rate, FLOOR) + of_row.surprise)
    elif CAP:
        value *= of_row.g
    if CAP:
        value *= 1.0 - (u / of_row.cap) * (u / of_row.cap)
    return value


@triton.jit
def one_minus_exp(x, ACC: tl.constexpr):
    """Return 1 - e^x for x <= 0, by a series if e^x is near 1."""
    near = -x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x / 720)))))
    if tl.float64 == ACC:
        return tl.where(x > -1e-3, near, 1.0 - tl.exp(x))
    else:
        return tl.where(x > -0.25, near, 1.0 - exp(x, ACC))

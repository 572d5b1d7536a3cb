"""Log-probs of labels under logits, and the gradient of the logits: one program a row.

Forward, where no statistic is asked for, is anchored at the label: logp = -log1p(sum over j != y of exp(z_j - z_y)).
The label's logit is loaded first, so the sum needs no running maximum: per logit it is a widening, a subtraction, a
multiplication, an exponential and an addition. The label is kept out of the sum by giving its block, and the last one,
a masked pass of their own. A row whose other logits lie far above the label's, and every row with statistics, is
anchored at its running maximum instead.

The order of a row's sums depends on V alone, so its bits do not depend on what else is in the batch. A sequence is
summed by whichever of its programs finishes last, in the order of its tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import (
    accumulator,
    dense,
    exp,
    join,
    log1p,
    on_device,
    power,
    power_rate,
    split,
    tanh,
)

# Above this the sum is redone from the maximum: 1/(1+s) must stay a normal float32, and so must what it multiplies.
ANCHOR_LIMIT: tl.constexpr = tl.constexpr(float(2**60))
# Tokens of a sequence that are summed at a time.
SUM_BLOCK: tl.constexpr = tl.constexpr(1024)

LSE: tl.constexpr = tl.constexpr(1)
ENTROPY: tl.constexpr = tl.constexpr(2)
MEAN: tl.constexpr = tl.constexpr(4)
TOP1: tl.constexpr = tl.constexpr(8)
LOG_SUM_SQ: tl.constexpr = tl.constexpr(16)
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


@triton.jit
def _squash(x, inner, cap, CAP: tl.constexpr, ACC: tl.constexpr):
    """u(x) = x, or cap * tanh(x * inner): what is left of the logits' transform is one factor, z = rate * u."""
    x = x.to(ACC)
    if CAP:
        x = cap * tanh(x * inner, ACC)
    return x


@triton.jit
def _locate(cu_seqlens, n_sequences, b, t, SHIFT: tl.constexpr, PACKED: tl.constexpr):
    """The sequence of token t of row b, whether it is in one, and whether it has a label there to be scored against."""
    sequence = b
    inside = t >= 0
    followed = inside
    if PACKED:
        before = tl.zeros((SUM_BLOCK,), tl.int32)
        at_next = tl.zeros((SUM_BLOCK,), tl.int32)
        for start in range(1, n_sequences + 1, SUM_BLOCK):
            i = start + tl.arange(0, SUM_BLOCK)
            bound = tl.load(cu_seqlens + i, mask=i <= n_sequences, other=2147483647)
            before += (bound <= t).to(tl.int32)
            at_next += (bound == t + 1).to(tl.int32)
        sequence = tl.sum(before)
        # Boundaries are not checked on a GPU; a token that they leave out must still lead to no memory but ours.
        inside = (sequence < n_sequences) & (t >= tl.load(cu_seqlens))
        tl.device_assert(inside, "cu_seqlens must rise from 0 to the number of tokens")
        sequence = tl.where(inside, sequence, 0)
        followed = inside
        if SHIFT:
            followed = inside & (tl.sum(at_next) == 0)
    return sequence, inside, followed


@triton.jit
def _fold(u, m, rest, weighted, squares, rate, STATS: tl.constexpr, ACC: tl.constexpr):
    """Add a block to a row's sums, and rescale them where it raises the row's maximum, which few blocks do."""
    top = tl.max(u)
    if top > m:
        # Nothing has been summed while the maximum is -inf, and nothing then has to be rescaled.
        gap = tl.where(m == -float("inf"), 0.0, (m - top) * rate)
        f = power(gap, ACC)
        if ENTROPY & STATS:
            # Where f is 0 so is the sum, however far below the maximum has been: 0 * inf otherwise.
            weighted = tl.where(f == 0.0, 0.0, f * (weighted + gap * rest))
        if LOG_SUM_SQ & STATS:
            squares = f * f * squares
        rest = f * rest
        m = top
    d = (u - tl.where(m == -float("inf"), 0.0, m)) * rate
    e = power(d, ACC)
    if ENTROPY & STATS:
        # The floor keeps 0 * -inf out; a NaN that it swallows is in e.
        weighted += e * tl.maximum(d, -1e30)
    if LOG_SUM_SQ & STATS:
        squares += e * e
    return m, top, rest + e, weighted, squares


@triton.jit
def _online(
    row, stride_v, V, n, label, u_y, rate, inner, cap,
    STATS: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A row of n logits, which is V or, where it is not scored, 0, anchored at its running maximum.

    Returns the maximum of u; the sums over j != y of e, e*d and e*e, where e = exp(d) and d = rate*(u - maximum), the
    second as e times what `power` takes; the sum of u; and the maxima of u before and after the label.
    """
    minus_inf = -float("inf")
    rate = power_rate(rate, ACC)
    m = u_y
    rest = tl.zeros((BLOCK,), ACC)
    weighted = tl.zeros((BLOCK,), ACC)
    squares = tl.zeros((BLOCK,), ACC)
    total = tl.zeros((BLOCK,), ACC)
    before = tl.full((), minus_inf, ACC)
    after = tl.full((), minus_inf, ACC)
    last = tl.cdiv(n, BLOCK) - 1
    special = tl.maximum(label, 0) // BLOCK
    skip = special < last
    for i in tl.range(0, last - skip.to(tl.int32), num_stages=STAGES):
        block = i + (skip & (i >= special)).to(tl.int32)
        k = block * BLOCK + tl.arange(0, BLOCK)
        offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
        u = _squash(tl.load(row + offset), inner, cap, CAP, ACC)
        if MEAN & STATS:
            total += u
        m, top, rest, weighted, squares = _fold(u, m, rest, weighted, squares, rate, STATS, ACC)
        if TOP1 & STATS:
            before = tl.maximum(before, tl.where(block < special, top, minus_inf))
            after = tl.maximum(after, tl.where(block > special, top, minus_inf))
    # The label's block and the last, which may be the same one.
    for block in range(special, last + 1, tl.maximum(last - special, 1)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
        u = _squash(tl.load(row + offset, mask=k < V, other=0.0), inner, cap, CAP, ACC)
        if MEAN & STATS:
            total += tl.where(k < V, u, 0.0)
        u = tl.where((k < V) & (k != label), u, minus_inf)
        m, top, rest, weighted, squares = _fold(u, m, rest, weighted, squares, rate, STATS, ACC)
        if TOP1 & STATS:
            before = tl.maximum(before, tl.max(tl.where(k < label, u, minus_inf)))
            after = tl.maximum(after, tl.max(tl.where(k > label, u, minus_inf)))
    return m, tl.sum(rest), tl.sum(weighted), tl.sum(squares), tl.sum(total), before, after


# Arguments that differ from batch to batch: a new value must not compile a new kernel in the middle of training. ALIGN
# says how rows of logits are aligned; a small tensor may be a slice that begins anywhere.
LENGTHS = ["rows", "n_sequences", "n_rows", "ignore_index", "stride_b", "stride_lb"]
SMALL_TENSORS = ["labels", "cu_seqlens", "weights", "norm"]


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SMALL_TENSORS)
def logprobs_forward_kernel(
    logits, labels, cu_seqlens, weights,  # (B, T, V), (B, T), (S+1,), (B, T')
    logps, norm, sequences, counts, tickets,  # (B, T'), (3 or 4, B, T'), (S,), (S,), (S,) zeros
    lse, entropy, mean_logits, is_top1, log_sum_sq_probs,  # (B, T')
    V, rows, n_sequences, n_rows,  # V, T', S, B*T'
    stride_b, stride_t, stride_v, stride_lb, stride_lt,
    ignore_index, rate_high, rate_low, inner_high, inner_low, cap_high, cap_low,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr, REDUCTION: tl.constexpr, STATS: tl.constexpr,
    CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program r scores row r of (B, T')."""
    r = tl.program_id(0)
    b = r // rows
    t = r % rows
    rate = join(rate_high, rate_low, ACC)
    inner = join(inner_high, inner_low, ACC)
    cap = join(cap_high, cap_low, ACC)
    rate_power = power_rate(rate, ACC)
    minus_inf = -float("inf")

    sequence, inside, followed = _locate(cu_seqlens, n_sequences, b, t, SHIFT, PACKED)
    label = tl.load(labels + b.to(tl.int64) * stride_lb + (t + SHIFT).to(tl.int64) * stride_lt)
    scored = followed & (label != ignore_index)
    valid = (label >= 0) & (label < V)
    tl.device_assert(valid | (scored == 0), "a label is outside [0, V) and is not ignore_index")
    # Nothing of a row that is not scored is read; a label that is out of range makes its row NaN.
    n = tl.where(scored & valid, V, 0)
    label = tl.where(scored & valid, label, -1).to(tl.int32)
    row = logits + tl.multiple_of(b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t, ALIGN)
    own = label.to(tl.int64) * stride_v if WIDE else label * stride_v
    u_y = _squash(tl.load(row + own, mask=n > 0, other=float("nan")), inner, cap, CAP, ACC)

    s = tl.zeros((), ACC)
    if LSE >= STATS:
        last = tl.cdiv(n, BLOCK) - 1
        special = tl.maximum(label, 0) // BLOCK
        acc = tl.zeros((BLOCK,), ACC)
        # Full blocks but the label's: nothing is masked, nothing is compared.
        skip = special < last
        for i in tl.range(0, last - skip.to(tl.int32), num_stages=STAGES):
            k = (i + (skip & (i >= special)).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            u = _squash(tl.load(row + offset), inner, cap, CAP, ACC)
            acc += power((u - u_y) * rate_power, ACC)
        # The label's block and the last, which may be the same one.
        for block in range(special, last + 1, tl.maximum(last - special, 1)):
            k = block * BLOCK + tl.arange(0, BLOCK)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            u = _squash(tl.load(row + offset, mask=k < V, other=0.0), inner, cap, CAP, ACC)
            acc += tl.where((k < V) & (k != label), power((u - u_y) * rate_power, ACC), 0.0)
        s = tl.sum(acc)

    finite = (u_y > minus_inf) & (u_y < -minus_inf)
    anchor = u_y
    logp = -log1p(s)
    log_total = log1p(s)
    inverse = 1.0 / (1.0 + s)
    # Written so that a NaN takes this way too: it then reaches the outputs by the sums themselves.
    if (LSE < STATS) | (((s < ANCHOR_LIMIT) & finite) == 0):
        m, rest, weighted, squares, total, before, after = _online(
            row, stride_v, V, n, label, u_y, rate, inner, cap, STATS, CAP, ACC, WIDE, BLOCK,
            STAGES,
        )  # fmt: skip
        d_y = (u_y - m) * rate  # NaN where the row's maximum is not finite
        e_y = exp(d_y, ACC)
        sum_all = rest + e_y
        anchor = m
        log_total = tl.log(sum_all)
        logp = tl.where(u_y == m, -log1p(rest + 0.0 * d_y), d_y - log_total)
        inverse = 1.0 / sum_all
        if ENTROPY & STATS:
            own_term = tl.where(e_y == 0.0, 0.0, e_y * d_y)
            weighted = weighted * (rate / rate_power)  # from powers of 2, where they are that, to nats
            h = tl.where(scored, log_total - (weighted + own_term) / sum_all, 0.0)
            tl.store(entropy + r, h)
            tl.store(norm + 3 * n_rows.to(tl.int64) + r, h)
        if MEAN & STATS:
            tl.store(mean_logits + r, tl.where(scored, total * rate / V, 0.0))
        if TOP1 & STATS:
            # A maximum leaves NaNs out, and nothing is on top of one.
            tl.store(is_top1 + r, scored & (before < u_y) & (after <= u_y) & (logp == logp))
        if LOG_SUM_SQ & STATS:
            tl.store(log_sum_sq_probs + r, tl.where(scored, tl.log(squares + e_y * e_y) - 2.0 * log_total, 0.0))
    if LSE & STATS:
        tl.store(lse + r, tl.where(scored, anchor * rate + log_total, 0.0))
    tl.store(logps + r, tl.where(scored, logp, 0.0))
    tl.store(norm + r, tl.where(scored, anchor, 0.0))
    tl.store(norm + n_rows + r, tl.where(scored, inverse, 0.0))
    tl.store(norm + 2 * n_rows.to(tl.int64) + r, tl.where(scored, logp, 0.0))

    if REDUCTION:
        begin = 0
        end = rows
        if PACKED:
            begin = tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int32), 0)
            end = tl.minimum(tl.load(cu_seqlens + sequence + 1, mask=inside, other=0).to(tl.int32), rows)
        tl.debug_barrier()  # the stores above must be seen before the ticket is
        # A token outside of every sequence takes no ticket of one.
        ticket = tl.atomic_add(tickets + sequence, 1, mask=inside)
        if inside & (ticket == end - begin - 1):
            sums = tl.zeros((SUM_BLOCK,), ACC)
            count = tl.zeros((SUM_BLOCK,), tl.int32)
            first = b.to(tl.int64) * rows
            for start in range(begin, end, SUM_BLOCK):
                token = start + tl.arange(0, SUM_BLOCK)
                within = token < end
                at = labels + b.to(tl.int64) * stride_lb + (token + SHIFT).to(tl.int64) * stride_lt
                counts_here = within & (tl.load(at, mask=within, other=0) != ignore_index)
                if SHIFT and PACKED:
                    counts_here = counts_here & (token + 1 < tl.load(cu_seqlens + sequence + 1))
                # Volatile: other programs wrote these while this one ran.
                values = tl.load(logps + first + token, mask=counts_here, other=0.0, volatile=True)
                if WEIGHTED:
                    weight = tl.load(weights + first + token, mask=counts_here, other=0.0).to(ACC)
                    values = tl.where(weight == 0.0, 0.0, weight * values)  # 0 leaves out what may be -inf
                sums += values
                count += counts_here.to(tl.int32)
            summed = tl.sum(sums)
            scored_tokens = tl.sum(count)
            if REDUCTION == 2:
                summed = summed / tl.maximum(scored_tokens, 1).to(ACC)
            tl.store(sequences + sequence, summed)
            tl.store(counts + sequence, scored_tokens)


@triton.jit(
    do_not_specialize=[*LENGTHS, "tokens", "out_b"],
    do_not_specialize_on_alignment=[*SMALL_TENSORS, "grad", "grad_entropy", "counts"],
)
def logprobs_backward_kernel(
    out, grad, grad_entropy, logits, labels, cu_seqlens, weights,  # (B, T, V), (B, T') or (S,), (B, T'), ...
    norm, counts,  # (3 or 4, B, T'), (S,)
    V, tokens, rows, n_sequences, n_rows,  # V, T, T', S, B*T'
    out_b, out_t, out_v, stride_b, stride_t, stride_v, stride_lb, stride_lt,
    ignore_index, rate_high, rate_low, inner_high, inner_low, cap_high, cap_low, slope_high, slope_low,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr, REDUCTION: tl.constexpr, GRAD: tl.constexpr,
    GRAD_ENTROPY: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program q writes the gradient of row q of (B, T): zeros where it is not scored. `out` may be the logits."""
    q = tl.program_id(0)
    b = q // tokens
    t = q % tokens
    rate = join(rate_high, rate_low, ACC)
    inner = join(inner_high, inner_low, ACC)
    cap = join(cap_high, cap_low, ACC)
    slope = join(slope_high, slope_low, ACC)

    sequence, _, followed = _locate(cu_seqlens, n_sequences, b, t, SHIFT, PACKED)
    at = labels + b.to(tl.int64) * stride_lb + (t + SHIFT).to(tl.int64) * stride_lt
    label = tl.load(at, mask=t < rows, other=0)
    scored = followed & (t < rows) & (label != ignore_index)
    row = logits + tl.multiple_of(b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t, ALIGN)
    to = out + tl.multiple_of(b.to(tl.int64) * out_b + t.to(tl.int64) * out_t, OUT_ALIGN)

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
        valid = (label >= 0) & (label < V)
        own = tl.where(valid, label, 0).to(tl.int64) * stride_v
        u_y = anchor
        if CAP:
            u_y = _squash(tl.load(row + own), inner, cap, CAP, ACC)
            tl.debug_barrier()  # in place, no thread may write before every thread has the label's logit
        factor = -inverse * slope
        if not (GRAD_ENTROPY or CAP):
            factor *= g
        full = V // BLOCK
        for i in tl.range(0, full, num_stages=STAGES):
            k = i * BLOCK + tl.arange(0, BLOCK)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            out_offset = k.to(tl.int64) * out_v if WIDE else k * out_v
            x = tl.load(row + offset)
            value = _gradient(x, anchor, factor, rate, inner, cap, g, h, surprise, GRAD_ENTROPY, CAP, ACC)
            tl.store(to + out_offset, value.to(out.dtype.element_ty))
        if full * BLOCK < V:
            k = full * BLOCK + tl.arange(0, BLOCK)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            out_offset = k.to(tl.int64) * out_v if WIDE else k * out_v
            x = tl.load(row + offset, mask=k < V, other=0.0)
            value = _gradient(x, anchor, factor, rate, inner, cap, g, h, surprise, GRAD_ENTROPY, CAP, ACC)
            tl.store(to + out_offset, value.to(out.dtype.element_ty), mask=k < V)
        # 1 - p without cancellation: -expm1(logp) = p * s, and s = (1 - inverse) / inverse where anchored at the label.
        missing = _one_minus_exp(logp, ACC)
        value = g * missing
        if GRAD_ENTROPY:
            p = exp(logp, ACC)
            value -= tl.where(p == 0.0, 0.0, h * p * (logp + surprise - tl.log(inverse)))
        value *= slope
        if CAP:
            value *= 1.0 - (u_y / cap) * (u_y / cap)
        tl.debug_barrier()  # the label's gradient goes over what its block wrote there
        own_out = tl.where(valid, label, 0).to(tl.int64) * out_v
        tl.store(to + own_out, value.to(out.dtype.element_ty), mask=valid)
    else:
        for start in range(0, V, BLOCK):
            k = start + tl.arange(0, BLOCK)
            out_offset = k.to(tl.int64) * out_v if WIDE else k * out_v
            tl.store(to + out_offset, tl.zeros((BLOCK,), out.dtype.element_ty), mask=k < V)


@triton.jit
def _gradient(
    x, anchor, factor, rate, inner, cap, g, h, surprise,
    GRAD_ENTROPY: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """-p * slope * (g + h * (log p + entropy)), with 1/S, the slope and, where it is all there is, g in `factor`."""
    u = _squash(x, inner, cap, CAP, ACC)
    value = power((u - anchor) * power_rate(rate, ACC), ACC) * factor
    if GRAD_ENTROPY:
        value *= g + h * (tl.maximum((u - anchor) * rate, -1e30) + surprise)
    elif CAP:
        value *= g
    if CAP:
        value *= 1.0 - (u / cap) * (u / cap)
    return value


@triton.jit
def _one_minus_exp(x, ACC: tl.constexpr):
    """1 - e^x for x <= 0, by its series where e^x is near 1."""
    near = -x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x / 720)))))
    if tl.float64 == ACC:
        # (1 - u) * x / log(u), u = e^x, exact where u rounds.
        u = tl.exp(x)
        return tl.where(x > -1e-3, near, 1.0 - u)
    else:
        return tl.where(x > -0.25, near, 1.0 - exp(x, ACC))


def _alignment(*strides: int, itemsize: int) -> int:
    """Elements of 16 bytes where every row starts at a multiple of them, else 1.

    Nothing between: how wide loads are decides which thread sums what, and with less than 16 bytes it would depend on
    where a tensor begins.
    """
    whole = 16 // itemsize
    return whole if math.gcd(whole, *strides) == whole else 1


def _transform(logit_scale: float, temperature: float, softcap: float | None) -> tuple[float, float, float, float]:
    """rate, inner, cap, slope: z = rate * u, u = x or cap * tanh(inner * x), slope = dz/dx at 0."""
    if softcap is None:
        return logit_scale / temperature, 1.0, 1.0, logit_scale / temperature
    return 1 / temperature, logit_scale / softcap, softcap, logit_scale / temperature


def logprobs(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None, ignore_index: int, shift: bool,
    logit_scale: float, temperature: float, softcap: float | None, reduction: str, stats: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::logprobs`."""
    B, T, V = logits.shape
    rows = max(T - shift, 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    reduced = n_sequences if reduction != "none" else 0

    def statistic(bit: int, kind: torch.dtype) -> Tensor:
        return logits.new_empty((B, rows) if stats >> bit & 1 else (0,), dtype=kind)

    logps = logits.new_empty((B, rows), dtype=dtype)
    norm = logits.new_empty((4 if stats & ENTROPY.value else 3, B, rows), dtype=dtype)
    # A sequence without tokens has no program that would write its sum.
    fresh = logits.new_zeros if cu_seqlens is not None or rows == 0 else logits.new_empty
    sequences = fresh((reduced,), dtype=dtype)
    counts = fresh((reduced,), dtype=torch.int32)
    tickets = logits.new_zeros((reduced,), dtype=torch.int32)
    statistics = [statistic(bit, torch.bool if bit == 3 else dtype) for bit in range(5)]
    if B * rows:
        rate, inner, cap, _ = _transform(logit_scale, temperature, softcap)
        kernel = "logprobs_forward" if stats <= LSE.value else "logprobs_statistics"
        block, warps, stages = launches.ROWS[kernel, logits.element_size()]
        with on_device(logits.device):
            logprobs_forward_kernel[(B * rows,)](
                logits, labels, *dense(cu_seqlens, weights), logps, norm, sequences, counts, tickets, *statistics,
                V, rows, n_sequences, B * rows, *logits.stride(), *labels.stride(),
                ignore_index, *split(rate), *split(inner), *split(cap),
                SHIFT=int(shift), PACKED=cu_seqlens is not None, WEIGHTED=weights is not None,
                REDUCTION=REDUCTIONS[reduction], STATS=stats, CAP=softcap is not None, ACC=accumulator(logits.dtype),
                ALIGN=_alignment(logits.stride(0), logits.stride(1), itemsize=logits.element_size()),
                WIDE=logits.stride(2) != 1, BLOCK=block, STAGES=stages, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return logps, sequences, norm, counts, *statistics


def write_gradient(
    out: Tensor, grad: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, labels: Tensor,
    cu_seqlens: Tensor | None, weights: Tensor | None, norm: Tensor, counts: Tensor,
    ignore_index: int, shift: bool, logit_scale: float, temperature: float, softcap: float | None, reduction: str,
) -> None:  # fmt: skip
    """Write the gradient of logits to `out`, which may be the logits themselves."""
    B, T, V = logits.shape
    if B * T == 0:
        return
    rows = max(T - shift, 0)
    rate, inner, cap, slope = _transform(logit_scale, temperature, softcap)
    block, warps, stages = launches.ROWS["logprobs_backward", logits.element_size()]
    with on_device(logits.device):
        logprobs_backward_kernel[(B * T,)](
            out, *dense(grad, grad_entropy), logits, labels, *dense(cu_seqlens, weights, norm, counts),
            V, T, rows, B if cu_seqlens is None else cu_seqlens.shape[0] - 1, B * rows,
            *out.stride(), *logits.stride(), *labels.stride(),
            ignore_index, *split(rate), *split(inner), *split(cap), *split(slope),
            SHIFT=int(shift), PACKED=cu_seqlens is not None, WEIGHTED=weights is not None,
            REDUCTION=REDUCTIONS[reduction], GRAD=grad is not None, GRAD_ENTROPY=grad_entropy is not None,
            CAP=softcap is not None, ACC=accumulator(logits.dtype),
            ALIGN=_alignment(logits.stride(0), logits.stride(1), itemsize=logits.element_size()),
            OUT_ALIGN=_alignment(out.stride(0), out.stride(1), itemsize=out.element_size()),
            WIDE=logits.stride(2) != 1 or out.stride(2) != 1, BLOCK=block, STAGES=stages, num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip

"""Log-probs of labels under logits, and the launch of their gradient.

A row has one program, or several if rows are few. If no statistic but `lse` is asked for, the sum is anchored at the
label: logp = -log1p(sum over j != y of exp(z_j - z_y)). The label's logit is loaded first, so the sum needs no running
maximum. A logit then costs a widening, a subtraction, a multiplication, an exponential and an addition. The block that
holds the label and the row's last block go last, under a mask that leaves the label out. A row whose other logits lie
far above the label's is summed again from its maximum. A row with statistics is summed from its maximum at once: each
lane has a running maximum, and lanes are combined when a segment ends.

A row is summed in segments. V and the block alone decide where they end, and the row's program that finishes last adds
them up in order. The bits of a row therefore depend neither on the rest of the batch nor on the number of programs that
share the row. The program that finishes a sequence's last row sums the sequence, in the order of its tokens.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import accumulator, dense, exp, join, log1p, power, power_rate, split
from fastpref_kernels.triton.launch import launch
from fastpref_kernels.triton.logprobs_backward import logprobs_backward_kernel
from fastpref_kernels.triton.logprobs_rows import LENGTHS, SMALL_TENSORS, SUM_BLOCK, locate, squash

# Above this the sum is redone from the maximum: 1/(1+s) must stay a normal float32, and so must what it multiplies.
ANCHOR_LIMIT: tl.constexpr = tl.constexpr(float(2**60))
# Stands in for the logarithm of 0, so that 0 times it is 0.
FLOOR: tl.constexpr = tl.constexpr(-1e30)
# The most segments of a row.
SEGMENTS: tl.constexpr = tl.constexpr(launches.SEGMENTS)

LSE: tl.constexpr = tl.constexpr(1)
ENTROPY: tl.constexpr = tl.constexpr(2)
MEAN: tl.constexpr = tl.constexpr(4)
TOP1: tl.constexpr = tl.constexpr(8)
LOG_SUM_SQ: tl.constexpr = tl.constexpr(16)
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}

# Where a segment's numbers lie among the partial results of its row.
AT_REST: tl.constexpr = tl.constexpr(0)
AT_MAXIMUM: tl.constexpr = tl.constexpr(1)
AT_WEIGHTED: tl.constexpr = tl.constexpr(2)
AT_SQUARES: tl.constexpr = tl.constexpr(3)
AT_TOTAL: tl.constexpr = tl.constexpr(4)
AT_BEFORE: tl.constexpr = tl.constexpr(5)


@triton.jit
def _blocks(segment, segment_blocks, label, V, BLOCK: tl.constexpr):
    """Return the bounds of a segment's blocks.

    Blocks in range(begin, split) and in range(split + 1, end) are full and do not hold the label. Blocks in
    range(first, stop, step) need a mask: they hold the label or the end of the row.
    """
    last = tl.cdiv(V, BLOCK) - 1
    special = tl.maximum(label, 0) // BLOCK
    begin = segment * segment_blocks
    stop = begin + segment_blocks
    end = tl.minimum(stop, last)
    has_label = (special >= begin) & (special < stop)
    first = tl.where(has_label, special, last)
    stop = tl.where(last < stop, last, tl.where(has_label, special, last - 1)) + 1
    return begin, tl.where(has_label, special, end), end, first, stop, tl.maximum(last - first, 1)


@triton.jit
def _columns(block, BLOCK: tl.constexpr, LANE: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr):
    """Return the first WIDTH columns of each lane of a block.

    A lane is LANE logits along AXIS. One thread holds all of them, so a sum over AXIS needs no barrier and no shuffle.
    """
    lanes: tl.constexpr = BLOCK // LANE
    lane = tl.expand_dims(tl.arange(0, lanes), AXIS)
    inner = tl.expand_dims(tl.arange(0, WIDTH), 1 - AXIS)
    if AXIS == 1:
        return block * BLOCK + lane * LANE + inner
    else:
        return block * BLOCK + inner * lanes + lane


@triton.jit
def _from_label(
    row, stride_v, V, segment, segment_blocks, label, u_y, rate, inner, cap,
    CAP: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
    AXIS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return the sum over j != y of exp(z_j - z_y) in a segment."""
    begin, split, end, first, stop, step = _blocks(segment, segment_blocks, label, V, BLOCK)
    rate = power_rate(rate, ACC)
    acc = tl.zeros((BLOCK // LANE,), ACC)
    for side in range(0, 2):
        start = tl.where(side == 0, begin, split + 1)
        for i in tl.range(0, tl.where(side == 0, split, end) - start, num_stages=STAGES):
            k = _columns(start + i, BLOCK, LANE, LANE, AXIS)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            u = squash(tl.load(row + offset), inner, cap, CAP, ACC)
            acc += tl.sum(power((u - u_y) * rate, ACC), AXIS)
    for block in range(first, stop, step):
        for i in range(0, LANE):
            k = _columns(block, BLOCK, LANE, 1, AXIS) + i * (1 if AXIS == 1 else BLOCK // LANE)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            u = squash(tl.load(row + offset, mask=k < V, other=0.0), inner, cap, CAP, ACC)
            acc += tl.sum(tl.where((k < V) & (k != label), power((u - u_y) * rate, ACC), 0.0), AXIS)
    return tl.sum(acc, 0)


@triton.jit
def _fold(u, m, rest, weighted, squares, rate, STATS: tl.constexpr, ACC: tl.constexpr, AXIS: tl.constexpr):
    """Add logits to the sums of their lanes, after rescaling the sums to the new maximum of each lane."""
    top = tl.maximum(m, tl.max(u, AXIS))
    gap = tl.maximum((m - top) * rate, FLOOR)
    f = power(gap, ACC)
    d = (u - tl.expand_dims(top, AXIS)) * rate
    e = power(d, ACC)
    if ENTROPY & STATS:
        # A NaN that the floor swallows is in e.
        weighted = f * (weighted + gap * rest) + tl.sum(e * tl.maximum(d, FLOOR), AXIS)
    if LOG_SUM_SQ & STATS:
        squares = f * f * squares + tl.sum(e * e, AXIS)
    return top, f * rest + tl.sum(e, AXIS), weighted, squares


@triton.jit
def _from_maximum(
    partial, row, stride_v, V, segment, segment_blocks, label, rate, inner, cap,
    STATS: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    LANE: tl.constexpr, AXIS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store a segment's maximum of u over j != y, and its sums anchored at that maximum.

    With d = rate * (u - maximum) and e = exp(d), these are the sums over j != y of e, of e times the argument for which
    `power` returns e, and of e*e; the sum of all u; and the maximum of u before the label.
    """
    begin, split, end, first, stop, step = _blocks(segment, segment_blocks, label, V, BLOCK)
    rate = power_rate(rate, ACC)
    minus_inf = -float("inf")
    lanes: tl.constexpr = BLOCK // LANE
    # A finite start keeps -inf - -inf out of the differences below.
    LOWEST: tl.constexpr = -1.7976931348623157e308 if tl.float64 == ACC else -3.4028234663852886e38
    m = tl.full((lanes,), LOWEST, ACC)
    rest = tl.zeros((lanes,), ACC)
    weighted = tl.zeros((lanes,), ACC)
    squares = tl.zeros((lanes,), ACC)
    total = tl.zeros((lanes,), ACC)
    before = tl.full((lanes,), minus_inf, ACC)
    for side in range(0, 2):
        start = tl.where(side == 0, begin, split + 1)
        for i in tl.range(0, tl.where(side == 0, split, end) - start, num_stages=STAGES):
            k = _columns(start + i, BLOCK, LANE, LANE, AXIS)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            u = squash(tl.load(row + offset), inner, cap, CAP, ACC)
            if MEAN & STATS:
                total += tl.sum(u, AXIS)
            m, rest, weighted, squares = _fold(u, m, rest, weighted, squares, rate, STATS, ACC, AXIS)
        if TOP1 & STATS:
            before = tl.where((side == 0) & (begin < split) & (begin * BLOCK <= label), m, before)
    for block in range(first, stop, step):
        for i in range(0, LANE):
            k = _columns(block, BLOCK, LANE, 1, AXIS) + i * (1 if AXIS == 1 else lanes)
            offset = k.to(tl.int64) * stride_v if WIDE else k * stride_v
            u = squash(tl.load(row + offset, mask=k < V, other=0.0), inner, cap, CAP, ACC)
            if MEAN & STATS:
                total += tl.sum(tl.where(k < V, u, 0.0), AXIS)
            u = tl.where((k < V) & (k != label), u, minus_inf)
            if TOP1 & STATS:
                before = tl.maximum(before, tl.max(tl.where(k < label, u, minus_inf), AXIS))
            m, rest, weighted, squares = _fold(u, m, rest, weighted, squares, rate, STATS, ACC, AXIS)
    anchor = tl.max(m, 0)
    gap = tl.maximum((m - anchor) * rate, FLOOR)
    f = power(gap, ACC)
    at = partial + segment
    tl.store(at + AT_REST * SEGMENTS, tl.sum(f * rest, 0))
    tl.store(at + AT_MAXIMUM * SEGMENTS, anchor)
    if ENTROPY & STATS:
        tl.store(at + AT_WEIGHTED * SEGMENTS, tl.sum(f * (weighted + gap * rest), 0))
    if LOG_SUM_SQ & STATS:
        tl.store(at + AT_SQUARES * SEGMENTS, tl.sum(f * f * squares, 0))
    if MEAN & STATS:
        tl.store(at + AT_TOTAL * SEGMENTS, tl.sum(total, 0))
    if TOP1 & STATS:
        tl.store(at + AT_BEFORE * SEGMENTS, tl.max(before, 0))


@triton.jit
def _partial(partial, of: tl.constexpr, count, other):
    """Load one number of each segment."""
    segment = tl.arange(0, SEGMENTS)
    # Volatile, because other programs may have written these while this one ran.
    return tl.load(partial + of * SEGMENTS + segment, mask=segment < count, other=other, volatile=True)


@triton.jit(
    do_not_specialize=[*LENGTHS, "segment_blocks"],
    do_not_specialize_on_alignment=SMALL_TENSORS,
)
def logprobs_forward_kernel(
    logits, labels, cu_seqlens, weights,  # (B, T, V), (B, T), (S+1,), (B, T')
    logps, norm, sequences, counts, tickets,  # (B, T'), (3 or 4, B, T'), (S,), (S,), (S,) zeros
    partials, row_tickets,  # (B, T', 2 or 6, SEGMENTS), (B, T') zeros
    lse, entropy, mean_logits, is_top1, log_sum_sq_probs,  # (B, T')
    V, rows, n_sequences, n_rows, segment_blocks, programs,  # V, T', S, B*T'
    stride_b, stride_t, stride_v, stride_lb, stride_lt,
    ignore_index, rate_high, rate_low, inner_high, inner_low, cap_high, cap_low,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr, REDUCTION: tl.constexpr,
    STATS: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Score row r of (B, T'). Programs r*programs to (r + 1)*programs - 1 share its segments."""
    r = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    b = r // rows
    t = r % rows
    rate = join(rate_high, rate_low, ACC)
    inner = join(inner_high, inner_low, ACC)
    cap = join(cap_high, cap_low, ACC)
    rate_power = power_rate(rate, ACC)
    minus_inf = -float("inf")
    # A lane is the 16 bytes that a thread loads at once. Where rows are not aligned it is eight logits of one thread,
    # each loaded alone. Where logits are strided it is one logit: how more would lie among threads depends on Triton.
    AXIS: tl.constexpr = 1 if WIDE or ALIGN > 1 else 0
    LANE: tl.constexpr = 1 if WIDE else ALIGN if ALIGN > 1 else 8
    NUMBERS: tl.constexpr = 2 if LSE >= STATS else 6

    sequence, inside, followed = locate(cu_seqlens, n_sequences, b, t, SHIFT, PACKED)
    label = tl.load(labels + b.to(tl.int64) * stride_lb + (t + SHIFT).to(tl.int64) * stride_lt)
    scored = followed & (label != ignore_index)
    valid = (label >= 0) & (label < V)
    tl.device_assert(valid | (scored == 0), "a label is outside [0, V) and is not ignore_index")
    # Nothing of a row that is not scored is read; a label that is out of range makes its row NaN.
    read = scored & valid
    # By `valid` alone: Triton 3.9 takes an address that depends on a reduction, as `followed` does, for unaligned.
    label = tl.where(valid, label, -1).to(tl.int32)
    row = logits + tl.multiple_of(b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t, ALIGN)
    own = label.to(tl.int64) * stride_v if WIDE else label * stride_v
    u_y = squash(tl.load(row + own, mask=read, other=float("nan")), inner, cap, CAP, ACC)

    segments = tl.cdiv(V, segment_blocks * BLOCK)
    share = tl.cdiv(segments, programs)
    segments = tl.where(read, segments, 0)
    partial = partials + r.to(tl.int64) * (NUMBERS * SEGMENTS)
    for segment in range(part * share, tl.minimum(part * share + share, segments)):
        if LSE >= STATS:
            s = _from_label(
                row, stride_v, V, segment, segment_blocks, label, u_y, rate, inner, cap,
                CAP, ACC, WIDE, BLOCK, LANE, AXIS, STAGES,
            )  # fmt: skip
            tl.store(partial + AT_REST * SEGMENTS + segment, s)
        else:
            _from_maximum(
                partial, row, stride_v, V, segment, segment_blocks, label, rate, inner, cap,
                STATS, CAP, ACC, WIDE, BLOCK, LANE, AXIS, STAGES,
            )  # fmt: skip
    # One thread stores what is one number, and the same thread takes the ticket, which releases its stores. Where the
    # program is alone, the barrier is what shows them to the other threads.
    tl.debug_barrier()
    if programs > 1:
        ticket = tl.atomic_add(row_tickets + r, 1)
        if ticket != programs - 1:
            return

    s = tl.zeros((), ACC)
    if LSE >= STATS:
        s = tl.sum(_partial(partial, AT_REST, segments, 0.0))
    finite = (u_y > minus_inf) & (u_y < -minus_inf)
    anchor = u_y
    logp = -log1p(s)
    log_total = log1p(s)
    inverse = 1.0 / (1.0 + s)
    # Written so that a NaN takes this way too: it then reaches the outputs by the sums themselves.
    if (LSE < STATS) | (((s < ANCHOR_LIMIT) & finite) == 0):
        if LSE >= STATS:
            # A segment's reductions have all threads meet before its store, so each has loaded the sums it goes over.
            for segment in range(0, segments):
                _from_maximum(
                    # Smaller blocks, so that this rare pass does not decide how many registers the kernel takes.
                    partial, row, stride_v, V, segment, segment_blocks * 4, label, rate, inner, cap,
                    STATS, CAP, ACC, WIDE, BLOCK // 4, LANE, AXIS, 1,
                )  # fmt: skip
            tl.debug_barrier()  # one thread stored what all of them load
        tops = _partial(partial, AT_MAXIMUM, segments, minus_inf)
        m = tl.maximum(tl.max(tops), u_y)
        gap = tl.maximum((tops - m) * rate_power, FLOOR)
        f = power(gap, ACC)
        rests = _partial(partial, AT_REST, segments, 0.0)
        d_y = (u_y - m) * rate  # NaN if the label's logit is +inf, or NaN
        e_y = exp(d_y, ACC)
        rest = tl.sum(f * rests)
        sum_all = rest + e_y
        anchor = tl.where(sum_all == 0.0, minus_inf, m)  # where all logits are -inf, so is their maximum
        log_total = tl.log(sum_all)
        logp = tl.where(u_y == m, -log1p(rest + 0.0 * d_y), d_y - log_total)
        inverse = 1.0 / sum_all
        if ENTROPY & STATS:
            own_term = tl.where(e_y == 0.0, 0.0, e_y * d_y)
            # From powers of 2, where they are that, to nats.
            weighted = tl.sum(f * (_partial(partial, AT_WEIGHTED, segments, 0.0) + gap * rests)) * (rate / rate_power)
            h = tl.where(scored, log_total - (weighted + own_term) / sum_all, 0.0)
            tl.store(entropy + r, h)
            tl.store(norm + 3 * n_rows.to(tl.int64) + r, h)
        if MEAN & STATS:
            total = tl.sum(_partial(partial, AT_TOTAL, segments, 0.0))
            tl.store(mean_logits + r, tl.where(scored, total * rate / V, 0.0))
        if TOP1 & STATS:
            # A maximum leaves NaNs out, and nothing is on top of one.
            before = tl.max(_partial(partial, AT_BEFORE, segments, minus_inf))
            tl.store(is_top1 + r, scored & (before < u_y) & (m == u_y) & (logp == logp))
        if LOG_SUM_SQ & STATS:
            squares = tl.sum(f * f * _partial(partial, AT_SQUARES, segments, 0.0))
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


def _alignment(tensor: Tensor, *strides: int) -> int:
    """Return how many elements 16 bytes hold if every row starts at a multiple of 16 bytes, else 1.

    Nothing in between: how wide loads are decides which thread sums what. With loads of 8 bytes a row's bits would
    depend on where its tensor begins.

    Args:
        tensor: the tensor that the rows are in.
        strides: the distances between rows, in elements.
    """
    whole = 16 // tensor.element_size()
    return whole if math.gcd(whole, *strides) == whole and tensor.data_ptr() % 16 == 0 else 1


def _transform(logit_scale: float, temperature: float, softcap: float | None) -> tuple[float, float, float, float]:
    """Return rate, inner, cap and slope: z = rate * u, u = x or cap * tanh(inner * x), and slope = dz/dx at 0."""
    if softcap is None:
        return logit_scale / temperature, 1.0, 1.0, logit_scale / temperature
    return 1 / temperature, logit_scale / softcap, softcap, logit_scale / temperature


@cache
def _multiprocessors(device: torch.device) -> int:
    """Return the number of a device's multiprocessors; 1 for the CPU that the interpreter runs on."""
    if device.type == "cpu":
        return 1
    properties = getattr(torch, device.type).get_device_properties(device)
    # Intel calls them subslices.
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def logprobs(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None, ignore_index: int, shift: bool,
    logit_scale: float, temperature: float, softcap: float | None, reduction: str, stats: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run `fastpref::logprobs`."""
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
        wide = logits.stride(2) != 1
        if wide:
            block //= 4  # a lane is then one logit, and its maximum and sums take registers of their own
        segment_blocks = launches.segment_blocks(V, block)
        segments = triton.cdiv(V, segment_blocks * block)
        programs = launches.row_programs(B * rows, segments, _multiprocessors(logits.device))
        partials = logps.new_empty((B, rows, 2 if stats <= LSE.value else 6, SEGMENTS.value))
        row_tickets = tickets if programs == 1 else logits.new_zeros((B, rows), dtype=torch.int32)
        launch(
            logprobs_forward_kernel, B * rows * programs,
            logits, labels, *dense(cu_seqlens, weights), logps, norm, sequences, counts, tickets,
            partials, row_tickets, *statistics,
            V, rows, n_sequences, B * rows, segment_blocks, programs, *logits.stride(), *labels.stride(),
            ignore_index, *split(rate, inner, cap),
            SHIFT=int(shift), PACKED=cu_seqlens is not None, WEIGHTED=weights is not None,
            REDUCTION=REDUCTIONS[reduction], STATS=stats, CAP=softcap is not None, ACC=accumulator(logits.dtype),
            ALIGN=_alignment(logits, *logits.stride()[:2]),
            WIDE=wide, BLOCK=block, STAGES=stages, num_warps=warps, enable_fp_fusion=True,
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
    blocks = triton.cdiv(V, block)
    programs = launches.row_programs(B * T, blocks, _multiprocessors(logits.device))
    launch(
        logprobs_backward_kernel, B * T * programs,
        out, *dense(grad, grad_entropy), logits, labels, *dense(cu_seqlens, weights, norm, counts),
        V, T, rows, B if cu_seqlens is None else cu_seqlens.shape[0] - 1, B * rows, programs,
        *out.stride(), *logits.stride(), *labels.stride(),
        ignore_index, *split(rate, inner, cap, slope),
        SHIFT=int(shift), PACKED=cu_seqlens is not None, WEIGHTED=weights is not None,
        REDUCTION=REDUCTIONS[reduction], GRAD=grad is not None, GRAD_ENTROPY=grad_entropy is not None,
        CAP=softcap is not None, ACC=accumulator(logits.dtype),
        ALIGN=_alignment(logits, *logits.stride()[:2]),
        OUT_ALIGN=_alignment(out, *out.stride()[:2]),
        WIDE=logits.stride(2) != 1 or out.stride(2) != 1, BLOCK=block, STAGES=stages, num_warps=warps,
        enable_fp_fusion=True,
    )  # fmt: skip

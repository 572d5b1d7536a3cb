"""The forward kernel of log-probs from logits.

If no statistic but `lse` is asked for, the sum is anchored at the label: logp = -log1p(sum over j != y of
exp(z_j - z_y)). The label's logit is loaded first, so the sum needs no running maximum. A logit then costs a widening,
a subtraction, a multiplication, an exponential and an addition. The block that holds the label and the row's last block
go last, under a mask that leaves the label out. A row whose other logits lie far above the label's is summed again from
its maximum. A row with statistics is summed from its maximum at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastpref_kernels.triton.common import join, log1p, power, power_rate
from fastpref_kernels.triton.constants import LSE
from fastpref_kernels.triton.logprobs_finish import (
    AT_REST,
    SEGMENTS,
    Outputs,
    finish_from_maximum,
    load_partial,
    store_row,
    sum_from_maximum,
    sum_sequence,
)
from fastpref_kernels.triton.logprobs_rows import (
    LENGTHS,
    SMALL_TENSORS,
    Batch,
    blocks_of,
    columns,
    load_row,
    load_token,
    load_u,
)

# Above this the sum is redone from the maximum: 1/(1+s) must stay a normal float32, and so must what it multiplies.
ANCHOR_LIMIT: tl.constexpr = tl.constexpr(float(2**60))


@triton.jit
def _sum_from_label(
    row,
    segment,
    segment_blocks,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    AXIS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return the sum over j != y of exp(z_j - z_y) in a segment."""
    begin, split, end, first, stop, step = blocks_of(row, segment, segment_blocks, BLOCK)
    rate = power_rate(row.rate, ACC)
    acc = tl.zeros((BLOCK // LANE,), ACC)
    for side in range(0, 2):
        start = tl.where(side == 0, begin, split + 1)
        for i in tl.range(0, tl.where(side == 0, split, end) - start, num_stages=STAGES):
            u = load_u(row, columns(start + i, BLOCK, LANE, LANE, AXIS), None, CAP, ACC, WIDE)
            acc += tl.sum(power((u - row.u_y) * rate, ACC), AXIS)
    for block in range(first, stop, step):
        for i in range(0, LANE):
            k = columns(block, BLOCK, LANE, 1, AXIS) + i * (1 if AXIS == 1 else BLOCK // LANE)
            u = load_u(row, k, k < row.V, CAP, ACC, WIDE)
            counts = (k < row.V) & (k != row.label)
            acc += tl.sum(tl.where(counts, power((u - row.u_y) * rate, ACC), 0.0), AXIS)
    return tl.sum(acc, 0)


@triton.jit(
    do_not_specialize=[*LENGTHS, "segment_blocks"],
    do_not_specialize_on_alignment=SMALL_TENSORS,
)
def logprobs_forward_kernel(
    logits, labels, cu_seqlens, weights,  # (B, T, V), (B, T), (S+1,), (B, T')
    logps, norm, sequences, counts, tickets,  # (B, T'), (3 or 4, B, T'), (S,), (S,), (S,) zeros
    partials, row_tickets,  # (B, T', NUMBERS, SEGMENTS), (B, T') zeros
    lse, entropy, mean_logits, is_top1, log_sum_sq_probs, top2_margin,  # (B, T')
    V, rows, n_sequences, n_rows, segment_blocks, programs,  # V, T', S, B*T'
    stride_b, stride_t, stride_v, stride_lb, stride_lt,
    ignore_index, rate_high, rate_low, inner_high, inner_low, cap_high, cap_low,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr, REDUCTION: tl.constexpr,
    STATS: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Score row r of (B, T'). Programs r*programs to (r + 1)*programs - 1 share its segments."""
    r = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    rate = join(rate_high, rate_low, ACC)
    inner = join(inner_high, inner_low, ACC)
    cap = join(cap_high, cap_low, ACC)
    # A lane is the 16 bytes that a thread loads at once. Where rows are not aligned it is eight logits of one thread,
    # each loaded alone. Where logits are strided it is one logit: how more would lie among threads depends on Triton.
    AXIS: tl.constexpr = 1 if WIDE or ALIGN > 1 else 0
    LANE: tl.constexpr = 1 if WIDE else ALIGN if ALIGN > 1 else 8
    PLAIN: tl.constexpr = LSE >= STATS

    batch = Batch(labels, stride_lb, stride_lt, cu_seqlens, weights, n_sequences, rows, ignore_index)
    out = Outputs(
        logps,
        norm,
        sequences,
        counts,
        tickets,
        lse,
        entropy,
        mean_logits,
        is_top1,
        log_sum_sq_probs,
        top2_margin,
        n_rows,
        r,
    )
    token = load_token(batch, r, SHIFT, PACKED)
    logits += tl.multiple_of(token.b.to(tl.int64) * stride_b + (r % rows).to(tl.int64) * stride_t, ALIGN)
    row, read = load_row(logits, stride_v, V, token, rate, inner, cap, CAP, ACC, WIDE)

    segments = tl.cdiv(V, segment_blocks * BLOCK)
    share = tl.cdiv(segments, programs)
    segments = tl.where(read, segments, 0)
    partial = partials + r.to(tl.int64) * (NUMBERS * SEGMENTS)
    for segment in range(part * share, tl.minimum(part * share + share, segments)):
        if PLAIN:
            s = _sum_from_label(row, segment, segment_blocks, CAP, ACC, WIDE, BLOCK, LANE, AXIS, STAGES)
            tl.store(partial + AT_REST * SEGMENTS + segment, s)
        else:
            sum_from_maximum(partial, row, segment, segment_blocks, STATS, CAP, ACC, WIDE, BLOCK, LANE, AXIS, STAGES)
    # One thread stores what is one number, and the same thread takes the ticket, which releases its stores. Where the
    # program is alone, the barrier is what shows them to the other threads.
    tl.debug_barrier()
    if programs > 1:
        ticket = tl.atomic_add(row_tickets + r, 1)
        if ticket != programs - 1:
            return

    if PLAIN:
        s = tl.sum(load_partial(partial, AT_REST, segments, 0.0))
        finite = (row.u_y > -float("inf")) & (row.u_y < float("inf"))
        anchor = row.u_y
        log_total = log1p(s)
        logp = -log1p(s)
        inverse = 1.0 / (1.0 + s)
        # Written so that a NaN takes this way too: it then reaches the outputs by the sums themselves.
        if ((s < ANCHOR_LIMIT) & finite) == 0:
            # A segment's reductions have all threads meet before its store, so each has loaded the sums it goes over.
            for segment in range(0, segments):
                # Smaller blocks, so that this rare pass does not decide how many registers the kernel takes.
                sum_from_maximum(
                    partial, row, segment, segment_blocks * 4, STATS, CAP, ACC, WIDE, BLOCK // 4, LANE, AXIS, 1
                )
            tl.debug_barrier()  # one thread stored what all of them load
            anchor, log_total, logp, inverse = finish_from_maximum(
                partial, row, segments, token.scored, out, STATS, ACC
            )
    else:
        anchor, log_total, logp, inverse = finish_from_maximum(partial, row, segments, token.scored, out, STATS, ACC)
    store_row(out, row, anchor, log_total, logp, inverse, token.scored, STATS)
    if REDUCTION:
        sum_sequence(out, batch, token, SHIFT, PACKED, WEIGHTED, REDUCTION, ACC)

"""Sum a row of logits from its maximum, with statistics, and finish it: what forward kernels share.

A row is summed in segments. V and the block alone decide where they end, and the program that finishes a row's last
segment adds them up in order, so the bits of a row depend neither on the rest of the batch nor on the number of
programs that share it. The program that finishes the last row of a sequence sums the sequence, in the order of its
tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastpref_kernels.contract import Statistic
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import exp, log1p, power, power_rate, top2, top2_of
from fastpref_kernels.triton.constants import (
    ENTROPY,
    FLOOR,
    IS_TOP1,
    LOG_SUM_SQ_PROBS,
    LSE,
    MEAN_LOGITS,
    TOP2_MARGIN,
)
from fastpref_kernels.triton.logprobs_rows import SUM_BLOCK, blocks_of, columns, load_u

# The statistics that the functions below have a branch for.
KNOWN: tl.constexpr = tl.constexpr(
    (
        Statistic.LSE
        | Statistic.ENTROPY
        | Statistic.MEAN_LOGITS
        | Statistic.IS_TOP1
        | Statistic.LOG_SUM_SQ_PROBS
        | Statistic.TOP2_MARGIN
    ).value
)
# The most segments of a row.
SEGMENTS: tl.constexpr = tl.constexpr(launches.SEGMENTS)

# Where a segment's numbers lie among the partial results of its row. A sum that is anchored at the label has the first.
AT_REST: tl.constexpr = tl.constexpr(0)
AT_MAXIMUM: tl.constexpr = tl.constexpr(1)
AT_WEIGHTED: tl.constexpr = tl.constexpr(2)
AT_SQUARES: tl.constexpr = tl.constexpr(3)
AT_TOTAL: tl.constexpr = tl.constexpr(4)
AT_BEFORE: tl.constexpr = tl.constexpr(5)
AT_BEST: tl.constexpr = tl.constexpr(6)
AT_SECOND: tl.constexpr = tl.constexpr(7)


def numbers(stats: int) -> int:
    """Return how many numbers of each segment a kernel keeps."""
    if stats <= Statistic.LSE:
        return 2
    # No more than needed: with other addresses ptxas spills some kernels for compute capability 10.0.
    return 8 if stats & Statistic.TOP2_MARGIN else 6


class Outputs(NamedTuple):
    """The tensors that a forward kernel writes, and the row to write.

    Attributes:
        logps: (B, T').
        norm: (3 or 4, B, T').
        sequences: (S,).
        counts: (S,).
        tickets: (S,), of 0 before the launch.
        lse, entropy, mean_logits, is_top1, log_sum_sq_probs, top2_margin: (B, T').
        n_rows: B * T'.
        r: the row to write.
    """

    logps: Any
    norm: Any
    sequences: Any
    counts: Any
    tickets: Any
    lse: Any
    entropy: Any
    mean_logits: Any
    is_top1: Any
    log_sum_sq_probs: Any
    top2_margin: Any
    n_rows: Any
    r: Any


@triton.jit
def _fold(
    u, m, rest, weighted, squares, best, second, rate, STATS: tl.constexpr, ACC: tl.constexpr, AXIS: tl.constexpr
):
    """Add logits to the sums of their lanes, after rescaling the sums to the new maximum of each lane."""
    if TOP2_MARGIN & STATS:
        u_best, u_second = top2_of(u, AXIS)
        best, second = top2(best, second, u_best, u_second)
    else:
        u_best = tl.max(u, AXIS)
    top = tl.maximum(m, u_best)
    gap = tl.maximum((m - top) * rate, FLOOR)
    f = power(gap, ACC)
    d = (u - tl.expand_dims(top, AXIS)) * rate
    e = power(d, ACC)
    if ENTROPY & STATS:
        # A NaN that the floor swallows is in e.
        weighted = f * (weighted + gap * rest) + tl.sum(e * tl.maximum(d, FLOOR), AXIS)
    if LOG_SUM_SQ_PROBS & STATS:
        squares = f * f * squares + tl.sum(e * e, AXIS)
    return top, f * rest + tl.sum(e, AXIS), weighted, squares, best, second


@triton.jit
def sum_from_maximum(
    partial,
    row,
    segment,
    segment_blocks,
    STATS: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    AXIS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store a segment's maximum of u over j != y, and its sums anchored at that maximum.

    Each lane has a running maximum, and lanes are combined at the end. With d = rate * (u - maximum) and e = exp(d),
    these are the sums over j != y of e, of e times the argument for which `power` returns e, and of e*e; the sum of all
    u; the maximum of u before the label; and the two largest u of j != y.
    """
    begin, split, end, first, stop, step = blocks_of(row, segment, segment_blocks, BLOCK)
    rate = power_rate(row.rate, ACC)
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
    best = tl.full((lanes,), minus_inf, ACC)
    second = tl.full((lanes,), minus_inf, ACC)
    for side in range(0, 2):
        start = tl.where(side == 0, begin, split + 1)
        for i in tl.range(0, tl.where(side == 0, split, end) - start, num_stages=STAGES):
            u = load_u(row, columns(start + i, BLOCK, LANE, LANE, AXIS), None, CAP, ACC, WIDE)
            if MEAN_LOGITS & STATS:
                total += tl.sum(u, AXIS)
            m, rest, weighted, squares, best, second = _fold(
                u, m, rest, weighted, squares, best, second, rate, STATS, ACC, AXIS
            )
        if IS_TOP1 & STATS:
            before = tl.where((side == 0) & (begin < split) & (begin * BLOCK <= row.label), m, before)
    for block in range(first, stop, step):
        for i in range(0, LANE):
            k = columns(block, BLOCK, LANE, 1, AXIS) + i * (1 if AXIS == 1 else lanes)
            u = load_u(row, k, k < row.V, CAP, ACC, WIDE)
            if MEAN_LOGITS & STATS:
                total += tl.sum(tl.where(k < row.V, u, 0.0), AXIS)
            u = tl.where((k < row.V) & (k != row.label), u, minus_inf)
            if IS_TOP1 & STATS:
                before = tl.maximum(before, tl.max(tl.where(k < row.label, u, minus_inf), AXIS))
            m, rest, weighted, squares, best, second = _fold(
                u, m, rest, weighted, squares, best, second, rate, STATS, ACC, AXIS
            )
    anchor = tl.max(m, 0)
    gap = tl.maximum((m - anchor) * rate, FLOOR)
    f = power(gap, ACC)
    at = partial + segment
    tl.store(at + AT_REST * SEGMENTS, tl.sum(f * rest, 0))
    tl.store(at + AT_MAXIMUM * SEGMENTS, anchor)
    if ENTROPY & STATS:
        tl.store(at + AT_WEIGHTED * SEGMENTS, tl.sum(f * (weighted + gap * rest), 0))
    if LOG_SUM_SQ_PROBS & STATS:
        tl.store(at + AT_SQUARES * SEGMENTS, tl.sum(f * f * squares, 0))
    if MEAN_LOGITS & STATS:
        tl.store(at + AT_TOTAL * SEGMENTS, tl.sum(total, 0))
    if IS_TOP1 & STATS:
        tl.store(at + AT_BEFORE * SEGMENTS, tl.max(before, 0))
    if TOP2_MARGIN & STATS:
        best, second = tl.reduce((best, second), 0, top2)
        tl.store(at + AT_BEST * SEGMENTS, best)
        tl.store(at + AT_SECOND * SEGMENTS, second)


@triton.jit
def load_partial(partial, of: tl.constexpr, count, other):
    """Return one number of each of the first `count` segments, and `other` for the rest."""
    segment = tl.arange(0, SEGMENTS)
    # Volatile, because other programs may have written these while this one ran.
    return tl.load(partial + of * SEGMENTS + segment, mask=segment < count, other=other, volatile=True)


@triton.jit
def finish_from_maximum(partial, row, segments, scored, out, STATS: tl.constexpr, ACC: tl.constexpr):
    """Add up a row's segments that `sum_from_maximum` stored, and store the row's statistics but for lse.

    Returns the anchor, the logarithm of the sum of all exponentials at that anchor, the log-prob, and one over the sum.
    """
    tl.static_assert((~KNOWN & STATS) == 0, "kernels on logits have no branch for one of these statistics")
    minus_inf = -float("inf")
    rate_power = power_rate(row.rate, ACC)
    tops = load_partial(partial, AT_MAXIMUM, segments, minus_inf)
    m = tl.maximum(tl.max(tops), row.u_y)
    gap = tl.maximum((tops - m) * rate_power, FLOOR)
    f = power(gap, ACC)
    rests = load_partial(partial, AT_REST, segments, 0.0)
    d_y = (row.u_y - m) * row.rate  # NaN if the label's logit is +inf, or NaN
    e_y = exp(d_y, ACC)
    rest = tl.sum(f * rests)
    sum_all = rest + e_y
    anchor = tl.where(sum_all == 0.0, minus_inf, m)  # where all logits are -inf, so is their maximum
    log_total = tl.log(sum_all)
    logp = tl.where(row.u_y == m, -log1p(rest + 0.0 * d_y), d_y - log_total)
    if ENTROPY & STATS:
        own_term = tl.where(e_y == 0.0, 0.0, e_y * d_y)
        # From powers of 2, where they are that, to nats.
        weighted = tl.sum(f * (load_partial(partial, AT_WEIGHTED, segments, 0.0) + gap * rests))
        weighted *= row.rate / rate_power
        h = tl.where(scored, log_total - (weighted + own_term) / sum_all, 0.0)
        tl.store(out.entropy + out.r, h)
        tl.store(out.norm + 3 * out.n_rows.to(tl.int64) + out.r, h)
    if MEAN_LOGITS & STATS:
        total = tl.sum(load_partial(partial, AT_TOTAL, segments, 0.0))
        tl.store(out.mean_logits + out.r, tl.where(scored, total * row.rate / row.V, 0.0))
    if IS_TOP1 & STATS:
        # A maximum leaves NaNs out, and nothing is on top of one.
        before = tl.max(load_partial(partial, AT_BEFORE, segments, minus_inf))
        tl.store(out.is_top1 + out.r, scored & (before < row.u_y) & (m == row.u_y) & (logp == logp))
    if LOG_SUM_SQ_PROBS & STATS:
        squares = tl.sum(f * f * load_partial(partial, AT_SQUARES, segments, 0.0))
        log_sum_sq = tl.log(squares + e_y * e_y) - 2.0 * log_total
        tl.store(out.log_sum_sq_probs + out.r, tl.where(scored, log_sum_sq, 0.0))
    if TOP2_MARGIN & STATS:
        bests = load_partial(partial, AT_BEST, segments, minus_inf)
        seconds = load_partial(partial, AT_SECOND, segments, minus_inf)
        best, second = tl.reduce((bests, seconds), 0, top2)
        best, second = top2(best, second, row.u_y, minus_inf)
        tl.store(out.top2_margin + out.r, tl.where(scored, (best - second) * row.rate, 0.0))
    return anchor, log_total, logp, 1.0 / sum_all


@triton.jit
def store_row(out, row, anchor, log_total, logp, inverse, scored, STATS: tl.constexpr):
    """Store a row's log-prob, lse and norm; zeros where it is not scored."""
    if LSE & STATS:
        tl.store(out.lse + out.r, tl.where(scored, anchor * row.rate + log_total, 0.0))
    tl.store(out.logps + out.r, tl.where(scored, logp, 0.0))
    tl.store(out.norm + out.r, tl.where(scored, anchor, 0.0))
    tl.store(out.norm + out.n_rows + out.r, tl.where(scored, inverse, 0.0))
    tl.store(out.norm + 2 * out.n_rows.to(tl.int64) + out.r, tl.where(scored, logp, 0.0))


@triton.jit
def sum_sequence(
    out,
    batch,
    token,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    REDUCTION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum or average the log-probs of a token's sequence, if all other tokens of it are finished."""
    begin = 0
    end = batch.rows
    if PACKED:
        begin = tl.maximum(tl.load(batch.cu_seqlens + token.sequence).to(tl.int32), 0)
        end = tl.load(batch.cu_seqlens + token.sequence + 1, mask=token.inside, other=0).to(tl.int32)
        end = tl.minimum(end, batch.rows)
    tl.debug_barrier()  # the token's own stores must be seen before the ticket is
    # A token outside of every sequence takes no ticket of one.
    ticket = tl.atomic_add(out.tickets + token.sequence, 1, mask=token.inside)
    if token.inside & (ticket == end - begin - 1):
        sums = tl.zeros((SUM_BLOCK,), ACC)
        count = tl.zeros((SUM_BLOCK,), tl.int32)
        first = token.b.to(tl.int64) * batch.rows
        for start in range(begin, end, SUM_BLOCK):
            t = start + tl.arange(0, SUM_BLOCK)
            within = t < end
            at = batch.labels + token.b.to(tl.int64) * batch.stride_b + (t + SHIFT).to(tl.int64) * batch.stride_t
            counts_here = within & (tl.load(at, mask=within, other=0) != batch.ignore_index)
            if SHIFT and PACKED:
                counts_here = counts_here & (t + 1 < tl.load(batch.cu_seqlens + token.sequence + 1))
            # Volatile: other programs wrote these while this one ran.
            values = tl.load(out.logps + first + t, mask=counts_here, other=0.0, volatile=True)
            if WEIGHTED:
                weight = tl.load(batch.weights + first + t, mask=counts_here, other=0.0).to(ACC)
                values = tl.where(weight == 0.0, 0.0, weight * values)  # 0 leaves out what may be -inf
            sums += values
            count += counts_here.to(tl.int32)
        summed = tl.sum(sums)
        scored_tokens = tl.sum(count)
        if REDUCTION == 2:
            summed = summed / tl.maximum(scored_tokens, 1).to(ACC)
        tl.store(out.sequences + token.sequence, summed)
        tl.store(out.counts + token.sequence, scored_tokens)

"""Find and load a row of logits: the functions that every kernel on logits starts with."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastpref_kernels.triton.common import tanh

# Tokens of a sequence that are summed at a time, and boundaries of sequences that are searched at a time.
SUM_BLOCK: tl.constexpr = tl.constexpr(256)

# Arguments that differ from batch to batch: a new value must not compile a new kernel in the middle of training. ALIGN
# says how rows of logits are aligned; a small tensor may be a slice that begins anywhere.
LENGTHS = ["rows", "n_sequences", "n_rows", "ignore_index", "stride_b", "stride_lb", "programs"]
SMALL_TENSORS = ["labels", "cu_seqlens", "weights", "norm"]


class Batch(NamedTuple):
    """The arguments of a kernel that describe the tokens.

    Attributes:
        labels: (B, T).
        stride_b, stride_t: the strides of `labels`.
        cu_seqlens: (S+1,), or None where each row of `labels` is a sequence.
        weights: (B, T'), or None.
        n_sequences: S.
        rows: T'.
        ignore_index: the label that is not scored.
    """

    labels: Any
    stride_b: Any
    stride_t: Any
    cu_seqlens: Any
    weights: Any
    n_sequences: Any
    rows: Any
    ignore_index: Any


class Token(NamedTuple):
    """A token of a batch.

    Attributes:
        b: its row of the batch.
        sequence: its sequence.
        inside: whether it is in a sequence.
        scored: whether it is scored.
        label: its label.
    """

    b: Any
    sequence: Any
    inside: Any
    scored: Any
    label: Any


class Row(NamedTuple):
    """A row of logits x, which are transformed to z = rate * u(x).

    Attributes:
        logits: where the row begins.
        stride: the distance between logits, in elements.
        V: the number of logits.
        label: the label; -1 where it is out of range.
        u_y: u of the label's logit.
        rate: dz/du.
        inner: multiplies x, where there is a cap.
        cap: the cap.
    """

    logits: Any
    stride: Any
    V: Any
    label: Any
    u_y: Any
    rate: Any
    inner: Any
    cap: Any


@triton.jit
def squash(x, inner, cap, CAP: tl.constexpr, ACC: tl.constexpr):
    """Return u(x) = x, or cap * tanh(x * inner) with a cap. A transformed logit is z = rate * u."""
    x = x.to(ACC)
    if CAP:
        x = cap * tanh(x * inner, ACC)
    return x


@triton.jit
def load_u(row, k, mask, CAP: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr):
    """Return u of the row's logits in columns k; of 0 where a mask is False."""
    offset = k.to(tl.int64) * row.stride if WIDE else k * row.stride
    if mask is None:
        x = tl.load(row.logits + offset)
    else:
        x = tl.load(row.logits + offset, mask=mask, other=0.0)
    return squash(x, row.inner, row.cap, CAP, ACC)


@triton.jit
def locate(batch, b, t, SHIFT: tl.constexpr, PACKED: tl.constexpr):
    """Return the sequence of token t of row b, whether it is in one, and whether that sequence has a label for it."""
    sequence = b
    inside = t >= 0
    followed = inside
    if PACKED:
        before = tl.zeros((SUM_BLOCK,), tl.int32)
        at_next = tl.zeros((SUM_BLOCK,), tl.int32)
        for start in range(1, batch.n_sequences + 1, SUM_BLOCK):
            i = start + tl.arange(0, SUM_BLOCK)
            bound = tl.load(batch.cu_seqlens + i, mask=i <= batch.n_sequences, other=2147483647)
            before += (bound <= t).to(tl.int32)
            at_next += (bound == t + 1).to(tl.int32)
        sequence = tl.sum(before)
        # Boundaries are not checked on a GPU. A token that they leave out must touch no memory of others.
        inside = (sequence < batch.n_sequences) & (t >= tl.load(batch.cu_seqlens))
        tl.device_assert(inside, "cu_seqlens must rise from 0 to the number of tokens")
        sequence = tl.where(inside, sequence, 0)
        followed = inside
        if SHIFT:
            followed = inside & (tl.sum(at_next) == 0)
    return sequence, inside, followed


@triton.jit
def load_token(batch, r, SHIFT: tl.constexpr, PACKED: tl.constexpr):
    """Return the token that row r of (B, T') scores."""
    b = r // batch.rows
    t = r % batch.rows
    sequence, inside, followed = locate(batch, b, t, SHIFT, PACKED)
    label = tl.load(batch.labels + b.to(tl.int64) * batch.stride_b + (t + SHIFT).to(tl.int64) * batch.stride_t)
    return Token(b, sequence, inside, followed & (label != batch.ignore_index), label)


@triton.jit
def load_row(
    logits,
    stride,
    V,
    token,
    rate,
    inner,
    cap,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return a token's row of logits, which begins at `logits`, and whether it is to be read.

    Nothing is read of a row that is not scored. A label that is out of range makes u_y NaN.
    """
    valid = (token.label >= 0) & (token.label < V)
    tl.device_assert(valid | (token.scored == 0), "a label is outside [0, V) and is not ignore_index")
    read = token.scored & valid
    # By `valid` alone: Triton 3.9 takes an address that depends on a reduction, as `scored` does, for unaligned.
    label = tl.where(valid, token.label, -1).to(tl.int32)
    own = label.to(tl.int64) * stride if WIDE else label * stride
    u_y = squash(tl.load(logits + own, mask=read, other=float("nan")), inner, cap, CAP, ACC)
    return Row(logits, stride, V, label, u_y, rate, inner, cap), read


@triton.jit
def blocks_of(row, segment, segment_blocks, BLOCK: tl.constexpr):
    """Return the bounds of a segment's blocks.

    Blocks in range(begin, split) and in range(split + 1, end) are full and do not hold the label. Blocks in
    range(first, stop, step) need a mask: they hold the label or the end of the row.
    """
    last = tl.cdiv(row.V, BLOCK) - 1
    special = tl.maximum(row.label, 0) // BLOCK
    begin = segment * segment_blocks
    stop = begin + segment_blocks
    end = tl.minimum(stop, last)
    has_label = (special >= begin) & (special < stop)
    first = tl.where(has_label, special, last)
    stop = tl.where(last < stop, last, tl.where(has_label, special, last - 1)) + 1
    return begin, tl.where(has_label, special, end), end, first, stop, tl.maximum(last - first, 1)


@triton.jit
def columns(block, BLOCK: tl.constexpr, LANE: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr):
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

"""Functions that the forward and the backward of log-probs from logits share."""

from __future__ import annotations

import triton
import triton.language as tl

from fastpref_kernels.triton.common import tanh

# Tokens of a sequence that are summed at a time, and boundaries of sequences that are searched at a time.
SUM_BLOCK: tl.constexpr = tl.constexpr(256)

# Arguments that differ from batch to batch: a new value must not compile a new kernel in the middle of training. ALIGN
# says how rows of logits are aligned; a small tensor may be a slice that begins anywhere.
LENGTHS = ["rows", "n_sequences", "n_rows", "ignore_index", "stride_b", "stride_lb", "programs"]
SMALL_TENSORS = ["labels", "cu_seqlens", "weights", "norm"]


@triton.jit
def squash(x, inner, cap, CAP: tl.constexpr, ACC: tl.constexpr):
    """Return u(x) = x, or cap * tanh(x * inner) with a cap. A transformed logit is z = rate * u."""
    x = x.to(ACC)
    if CAP:
        x = cap * tanh(x * inner, ACC)
    return x


@triton.jit
def locate(cu_seqlens, n_sequences, b, t, SHIFT: tl.constexpr, PACKED: tl.constexpr):
    """Return the sequence of token t of row b, whether it is in one, and whether that sequence has a label for it."""
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

"""Sequences of a batch: their number, their scored tokens, and LD-DPO's weights of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref._core.checks import check_same_device, shape_error
from fastpref._core.options import Reduction


def count_sequences(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many sequences (B, T), (T,) or packed labels hold."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return labels.shape[0] if labels.dim() == 2 else 1


def sequence_index(scored: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the index of the sequence that each position of `scored` (..., T) belongs to, of the same shape."""
    if cu_seqlens is None:
        rows = scored.numel() // max(scored.shape[-1], 1)
        return torch.arange(rows, device=scored.device).repeat_interleave(scored.shape[-1]).view(scored.shape)
    positions = torch.arange(scored.shape[-1], device=scored.device)
    index = torch.bucketize(positions, cu_seqlens[1:].long().contiguous(), right=True)
    # Wrong boundaries are rejected where values are checked; the clamp only keeps the index in range here.
    return index.clamp(max=max(cu_seqlens.shape[0] - 2, 0)).expand(scored.shape)


def sequence_lengths(scored: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Tensor:
    """Return how many positions of each sequence are scored, (S,) int64."""
    if cu_seqlens is None:
        return scored.sum(-1).reshape(sequences)
    counts = torch.zeros(sequences, dtype=torch.long, device=scored.device)
    return counts.index_add(0, sequence_index(scored, cu_seqlens).reshape(-1), scored.reshape(-1).long())


def ld_weights(
    scored: Tensor,
    cu_seqlens: Tensor | None,
    sequences: int,
    reduction: Reduction,
    dtype: torch.dtype,
) -> Tensor:
    """Return LD-DPO's token weights (arXiv 2409.06411): 1 on the first `shared_lengths` scored tokens, then α.

    Args:
        scored: (..., T) bool.
        cu_seqlens: None, or packed boundaries (S+1,).
        sequences: S.
        reduction: with α, the weight of the tail. Without lengths, the sequences are [chosen; rejected], and each pair
            shares its shorter length.

    Returns:
        Weights of `scored`'s shape, in `dtype`.
    """
    ld_alpha, shared_lengths = reduction.ld_alpha, reduction.shared_lengths
    assert ld_alpha is not None
    index = sequence_index(scored, cu_seqlens).reshape(-1)
    flat = scored.reshape(-1).long()
    counts = sequence_lengths(scored, cu_seqlens, sequences)
    if shared_lengths is None:
        if sequences % 2:
            raise ValueError(
                f"ld_alpha without shared_lengths takes the sequences as [chosen; rejected], an even number; "
                f"got {sequences}"
            )
        chosen, rejected = counts.chunk(2)
        shared_lengths = torch.minimum(chosen, rejected).repeat(2)
    else:
        if shared_lengths.shape != (sequences,):
            raise shape_error("shared_lengths", shared_lengths, f"({sequences},), one length for each sequence")
        check_same_device("shared_lengths", shared_lengths, "labels", scored)
    before = counts.cumsum(0) - counts
    ordinal = flat.cumsum(0) - flat - before[index]
    one = torch.ones((), dtype=dtype, device=scored.device)
    weights = torch.where(ordinal < shared_lengths[index], one, ld_alpha)
    return weights.view(scored.shape)


def weigh(logps: Tensor, weights: Tensor) -> Tensor:
    """Return weights times log-probs. A weight of 0 leaves its token out, even where the log-prob is −inf."""
    return weights * logps.masked_fill(weights == 0, 0.0)


def reduce_sequences(logps: Tensor, scored: Tensor, cu_seqlens: Tensor | None, reduction: Reduction) -> Tensor:
    """Return sequence log-probs (S,) from token log-probs (B, T'), summed in float64.

    Args:
        logps: (B, T').
        scored: (B, T') bool.
        cu_seqlens: None, or the packed boundaries (S+1,).
        reduction: a sum or a mean, with LD-DPO's weights if it has α.
    """
    sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weighted = logps
    if reduction.ld_alpha is not None:
        weighted = weigh(logps, ld_weights(scored, cu_seqlens, sequences, reduction, logps.dtype))
    if cu_seqlens is None:
        total = weighted.sum(-1, dtype=torch.float64)
    else:
        index = sequence_index(scored, cu_seqlens).reshape(-1)
        total = logps.new_zeros(sequences, dtype=torch.float64).index_add(0, index, weighted.reshape(-1).double())
    if reduction.name == "mean":
        total = total / sequence_lengths(scored, cu_seqlens, sequences).clamp(min=1)
    return total.to(logps.dtype)

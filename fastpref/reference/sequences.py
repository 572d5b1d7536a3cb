"""Which tokens are scored, which sequence each of them belongs to, and sums over sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def number_sequences(labels: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """Return the index of the sequence that each token belongs to, of labels' shape, and the number of sequences.

    Args:
        labels: (B, T), a sequence each row; (T,), one sequence; or packed, (N,) or (1, N).
        cu_seqlens: None, or the boundaries (S+1,) of packed sequences.

    Raises:
        ValueError: the boundaries do not rise from 0 to the number of tokens.
    """
    tokens = labels.shape[-1]
    if cu_seqlens is None:
        lengths, sequences = tokens, labels.shape[0] if labels.dim() == 2 else 1
    else:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {bounds}")
        lengths, sequences = cu_seqlens.diff(), len(bounds) - 1
    numbers = torch.arange(sequences, device=labels.device).repeat_interleave(lengths)
    return numbers.view(labels.shape), sequences


def score(labels: Tensor, numbers: Tensor, *, ignore_index: int, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the label that each position is scored against, whether it is scored, and its sequence, all (..., T').

    With `shift`, position t is scored against label t+1 if that is of the same sequence, and T' = T − 1. Otherwise it
    is scored against label t, and T' = T.
    """
    if not shift:
        return labels, labels != ignore_index, numbers
    targets, own = labels[..., 1:], numbers[..., :-1]
    return targets, (targets != ignore_index) & (numbers[..., 1:] == own), own


def sum_sequences(values: Tensor, numbers: Tensor, sequences: int) -> Tensor:
    """Return the sum of the values (..., T') of each sequence, (S,)."""
    return values.new_zeros(sequences).index_add(0, numbers.reshape(-1), values.reshape(-1))


def count_scored(scored: Tensor, numbers: Tensor, sequences: int) -> Tensor:
    """Return how many positions of each sequence are scored, (S,) int64."""
    return sum_sequences(scored.long(), numbers, sequences)


def ld_weights(
    scored: Tensor, numbers: Tensor, sequences: int, ld_alpha: float, shared_lengths: Tensor | None
) -> Tensor:
    """Return LD-DPO's weights of tokens (arXiv 2409.06411): 1 on a sequence's first tokens, then α.

    Args:
        scored: (..., T') bool.
        numbers: (..., T'), the sequence of each position.
        sequences: S.
        ld_alpha: α.
        shared_lengths: (S,), the number of scored tokens of each sequence that have weight 1. None: the sequences are
            [chosen; rejected], and both sequences of a pair take the number of the shorter one.

    Returns:
        (..., T'), float64.

    Raises:
        ValueError: the sequences are not [chosen; rejected], or `shared_lengths` are not (S,).
    """
    if shared_lengths is None:
        if sequences % 2:
            raise ValueError(
                "ld_alpha without shared_lengths takes the sequences as [chosen; rejected], an even number; "
                f"got {sequences}"
            )
        chosen, rejected = count_scored(scored, numbers, sequences).chunk(2)
        shared_lengths = torch.minimum(chosen, rejected).repeat(2)
    elif shared_lengths.shape != (sequences,):
        raise ValueError(
            f"shared_lengths must be ({sequences},), one length for each sequence; got {tuple(shared_lengths.shape)}"
        )
    weights = torch.ones(scored.shape, dtype=torch.float64, device=scored.device)
    for sequence in range(sequences):
        of_sequence = scored & (numbers == sequence)
        ordinal = of_sequence.flatten().cumsum(0).view(scored.shape)  # the first scored token has the number 1
        weights[of_sequence & (ordinal > shared_lengths[sequence])] = ld_alpha
    return weights

"""Reductions of losses, and the dtype that they are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in their common dtype, float32 at the least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple([tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors])


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Return the losses (B,), their sum, or their mean. A mean over nothing is 0."""
    if reduction == "none":
        return losses
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be one of 'none', 'sum', 'mean'; got {reduction!r}")
    return losses.mean() if reduction == "mean" and losses.numel() else losses.sum()


def counted(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in their common dtype, float32 at the least, and 0 where a token does not count."""
    return tuple(tensor.masked_fill(~mask, 0.0) for tensor in widen(*tensors))


def masked_mean(x: Tensor, mask: Tensor, reduction: str, denominator: Tensor | float | None) -> Tensor:
    """Return the mean of x (B, T), which is 0 where a token does not count. A mean over nothing is 0.

    Args:
        x: (B, T).
        mask: (B, T) bool, True where a token counts.
        reduction: "token" for the mean over all tokens, "sequence" for the mean over sequences of their means; a
            sequence without a token is in neither.
        denominator: None, or a number or tensor () to divide by instead of the count of tokens, or of sequences. 0
            divides by 1.
    """
    if reduction == "token":
        total, count = x.sum(), mask.sum()
    elif reduction == "sequence":
        lengths = mask.sum(1)
        total, count = (x.sum(1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
    else:
        raise ValueError(f"reduction must be one of 'token', 'sequence'; got {reduction!r}")
    if denominator is None:
        return total / count.clamp(min=1)
    if isinstance(denominator, Tensor):
        denominator = denominator.detach().to(x.dtype)
        return total / denominator.masked_fill(denominator == 0, 1.0)
    return total / float(denominator or 1)

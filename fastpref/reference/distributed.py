"""Vocabularies that are split over ranks: the definition gathers them, and each rank computes the whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref._sharding import Shard, resolve_head, resolve_logits


class _Gathered(torch.autograd.Function):
    """The parts of all ranks along `dim`, in their order. Every rank's gradient of the whole holds that of its part."""

    @staticmethod
    def forward(part: Tensor, dim: int, group: Any, first: int, size: int) -> Tensor:
        shape = list(part.shape)
        shape[dim] = size
        # A sum with zeros, since parts of unequal sizes cannot be gathered, in a dtype that every backend can sum.
        whole = part.new_zeros(shape, dtype=torch.promote_types(part.dtype, torch.float32))
        whole.narrow(dim, first, part.shape[dim]).copy_(part)
        dist.all_reduce(whole, group=group)
        return whole.to(part.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        part, ctx.dim, _, ctx.first, _ = inputs
        ctx.size = part.shape[ctx.dim]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grads[0].narrow(ctx.dim, ctx.first, ctx.size), None, None, None, None


def _gathered(part: Tensor, dim: int, shard: Shard) -> Tensor:
    return _Gathered.apply(part, dim, shard.group, *shard.bounds.tolist())  # type: ignore[return-value]


def whole_head(hidden: Any, weight: Any, bias: Any, labels: Any, process_group: Any) -> tuple[Any, Any, Any, Any]:
    """Hidden states, weight (V, H), bias (V,) and labels, plain and whole."""
    hidden, weight, bias, labels, shard = resolve_head(hidden, weight, bias, labels, process_group)
    if shard is not None:
        weight = _gathered(weight, 0, shard)
        bias = None if bias is None else _gathered(bias, 0, shard)
    return hidden, weight, bias, labels


def whole_logits(logits: Any, labels: Any, process_group: Any) -> tuple[Any, Any]:
    """Logits (..., V) and labels, plain and whole."""
    logits, labels, shard = resolve_logits(logits, labels, process_group)
    return logits if shard is None else _gathered(logits, logits.dim() - 1, shard), labels

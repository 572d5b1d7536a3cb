"""Vocabularies that are split over ranks: the parts are gathered, and every rank computes with the whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Concatenate the parts of all ranks. The backward gives each part its piece of this rank's gradient."""

    @staticmethod
    def forward(part: Tensor, dim: int, group: Any, sizes: list[int], rank: int) -> Tensor:
        shape = list(part.shape)
        shape[dim] = sum(sizes)
        # Zero-padded parts are summed, because parts of unequal sizes cannot be gathered, in a dtype that any backend
        # can sum.
        whole = part.new_zeros(shape, dtype=torch.promote_types(part.dtype, torch.float32))
        whole.narrow(dim, sum(sizes[:rank]), sizes[rank]).copy_(part)
        dist.all_reduce(whole, group=group)
        return whole.to(part.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.dim, _, ctx.sizes, ctx.rank = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grads[0].narrow(ctx.dim, sum(ctx.sizes[: ctx.rank]), ctx.sizes[ctx.rank]), None, None, None, None


def whole(value: Any) -> Any:
    """Return the whole tensor of a DTensor, on every rank, and any other value as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gather(part: Any, dim: int, process_group: Any) -> Any:
    """Return the whole of a tensor that is split along `dim` over the ranks of a group, on every rank.

    Args:
        part: this rank's part; or a DTensor, whose mesh says how it is split; or None, which is returned.
        dim: the dimension that is split.
        process_group: a process group or a one-dimensional device mesh; None for tensors that are whole.
    """
    part = whole(part)
    if part is None or process_group is None:
        return part
    group = process_group.get_group() if hasattr(process_group, "get_group") else process_group
    size = torch.tensor([part.shape[dim]], device=part.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    return _Gather.apply(part, dim, group, [int(size) for size in sizes], dist.get_rank(group))

"""All-reduces over the ranks of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(values: Tensor, group: Any, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce values over a group and return them, in place if they are contiguous."""
    values = values.contiguous()
    dist.all_reduce(values, operation, group=group)
    return values


def highest(values: Tensor, group: Any) -> Tensor:
    """Return the maximum over a group's ranks, in place if the values are contiguous."""
    return all_reduce(values, group, dist.ReduceOp.MAX)


def second_highest(top: Tensor, best: Tensor, second: Tensor, group: Any) -> Tensor:
    """Return the second-largest value over all ranks; the largest on a tie.

    Args:
        top: (R,), the largest value over all ranks.
        best: (R,), the largest value here.
        second: (R,), the second-largest value here; the largest on a tie.
        group: the ranks.
    """
    is_top = best == top
    holders = all_reduce(is_top.to(best.dtype), group)
    runner_up = highest(torch.where(is_top, second, best), group)
    return torch.where(holders > 1, top, runner_up)

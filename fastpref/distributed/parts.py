"""The sum of sequences' log-probs over ranks that hold parts of each sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref._core.checks import FLOATING, check_tensor
from fastpref._core.sharding import resolve_group
from fastpref.distributed.reduce import all_reduce


class _SummedParts(torch.autograd.Function):
    @staticmethod
    def forward(part: Tensor, group: Any) -> Tensor:
        return all_reduce(part.clone(), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grads[0], None


def sum_parts(parts: Tensor, process_group: Any) -> Tensor:
    """Return the sum over ranks of the parts of each sequence's log-prob, for sequence and context parallelism.

    Each rank holds some of the tokens of every sequence. It scores them with `shift=False` and labels that were shifted
    before the sequences were cut. The results of `sequence_logprobs(..., reduction="sum")` on all ranks then add up to
    the log-prob of each sequence. Every rank computes the same loss from the sums, and gets the gradient of its own
    tokens. The gradients of the weights must be added up over the ranks: configure a data-parallel wrapper to add and
    not to average.

    Args:
        parts: (B,) or (S,), differentiable.
        process_group: the ranks, or a one-dimensional device mesh.

    Returns:
        The sum, of the same shape, on every rank.

    Raises:
        TypeError: `parts` is not a floating-point tensor; `process_group` is neither a group nor a mesh.
        ValueError: the mesh has more dimensions; this rank is not in the group.
    """
    check_tensor("parts", parts, FLOATING, "a floating-point tensor (B,) or (S,)")
    return _SummedParts.apply(parts, resolve_group(process_group))  # type: ignore[return-value]

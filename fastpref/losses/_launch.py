"""Choose between a fused launch and the reference formula for a loss on (B,) tensors, and run the launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref._core.autograd import apply, enter, once_differentiable
from fastpref_kernels import ops


def fused(tensor: Tensor) -> bool:
    """Return whether a loss of this tensor runs as one launch instead of the reference formula."""
    return ops.fuses_losses(tensor.device)


class _FusedLoss(torch.autograd.Function):
    """Run an operator that returns a loss, its partial derivatives, and other values that it reports.

    For a loss of (B,) tensors, the partial derivatives are (n, B), with respect to the first n tensors. For a loss of
    (B, K) tensors, they are (B, K), with respect to the first tensor.
    """

    @staticmethod
    def forward(operator: str, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return getattr(torch.ops.fastpref, operator)(*tensors, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        partials = output[1]
        ctx.save_for_backward(partials)
        ctx.mark_non_differentiable(*output[1:])
        ctx.of_groups = inputs[2].dim() == 2
        differentiable = inputs[2 : 3 if ctx.of_groups else 2 + partials.shape[0]]
        ctx.dtypes = [tensor.dtype for tensor in differentiable]
        ctx.others = (None,) * (len(inputs) - 2 - len(differentiable))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (partials,) = ctx.saved_tensors
        grads = [grad_loss[..., None] * partials] if ctx.of_groups else (grad_loss * partials).unbind(0)
        needed = ctx.needs_input_grad[2 : 2 + len(ctx.dtypes)]
        given = [
            (grad if grad.dtype == dtype else grad.to(dtype)) if is_needed else None
            for grad, dtype, is_needed in zip(grads, ctx.dtypes, needed, strict=True)
        ]
        return None, None, *given, *ctx.others


def launch(operator: str, reduction: str, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Run `fastpref::operator`, and return the loss and the other values that the operator reports.

    Args:
        operator: the operator's name.
        reduction: "none", "sum" or "mean".
        tensors: the operator's tensors. The loss is differentiable with respect to the first of them.
        options: the operator's other arguments, without the reduction.
    """
    loss, _, *rest = apply(_FusedLoss, operator, (*options, reduction), *enter(*tensors))
    return (loss, *rest)

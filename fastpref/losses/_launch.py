"""The one place that asks a device for a fused launch of a loss on (B,) tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref._function import apply, enter, once_differentiable
from fastpref_kernels import ops


def fused(tensor: Any) -> bool:
    """Whether a loss of this tensor runs as one launch; if not, the reference formula is what runs."""
    return isinstance(tensor, Tensor) and ops.fuses_losses(tensor.device)


class _FusedLoss(torch.autograd.Function):
    """An operator that returns its loss and, beside it, the loss's partial derivatives.

    Of a loss of (B,) tensors the partial derivatives are (n, B), by the first n tensors; of one of (B, K) tensors they
    are (B, K), by the first.
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
    """Run `fastpref::operator`; returns (loss, *whatever it reports beside the loss), without the derivatives."""
    loss, _, *rest = apply(_FusedLoss, operator, (*options, reduction), *enter(*tensors))
    return (loss, *rest)

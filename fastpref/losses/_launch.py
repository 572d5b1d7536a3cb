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
    """An operator that returns its loss and, beside it, the loss's partial derivatives (B, columns)."""

    @staticmethod
    def forward(operator: str, *arguments: Any) -> tuple[Tensor, ...]:
        return getattr(torch.ops.fastpref, operator)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loss, partials, *rest = output
        del loss
        ctx.save_for_backward(partials)
        ctx.mark_non_differentiable(partials, *rest)
        # A (B, K) loss has one differentiable input; a loss of pairs has two, or four with its reference.
        ctx.inputs = [i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_floating_point()]
        ctx.dtypes = [inputs[i].dtype for i in ctx.inputs]
        ctx.arity = len(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (partials,) = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * ctx.arity
        scaled = grad_loss[..., None] * partials
        columns = [scaled] if len(ctx.inputs) == 1 else list(scaled.unbind(-1))
        for i, dtype, column in zip(ctx.inputs, ctx.dtypes, columns, strict=False):
            if ctx.needs_input_grad[i]:
                grads[i] = column.to(dtype)
        return tuple(grads)


def launch(operator: str, reduction: str, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Run `fastpref::operator`; returns (loss, *whatever it reports beside the loss), without the derivatives."""
    loss, _, *rest = apply(_FusedLoss, operator, *enter(*tensors), *options, reduction)
    return (loss, *rest)

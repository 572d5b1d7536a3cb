"""Calls of the losses of `fastpref.losses.TABLE`, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.losses import TABLE, Loss

Arguments = tuple[tuple[Tensor, ...], dict[str, Any]]
every_loss = pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point tensor in a dtype, and anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def example(loss: Loss, batch: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Arguments:
    """Return the loss's typical call, with its differentiable tensors multiplied by `scale`, rounded to `dtype`."""
    tensors, options = loss.example(torch.Generator().manual_seed(batch), batch)
    tensors = tuple(cast(t * scale if t.is_floating_point() else t, dtype) for t in tensors)
    return tensors, {**loss.options, **{name: cast(value, dtype) for name, value in options.items()}}


def value_of(result: Any) -> Tensor:
    """Return the loss of a function's result."""
    return result.loss if isinstance(result, tuple) else result


def fields(result: Any) -> tuple[Any, ...]:
    """Return what a function's result holds, without its empty fields, as a tuple."""
    return tuple(x for x in result if x is not None) if isinstance(result, (tuple, list)) else (result,)


def evaluate(function: Callable[..., Any], arguments: Arguments, dtype: torch.dtype, **more: Any) -> list[Tensor]:
    """Return the loss, what is reported beside it, and the gradient of every floating-point argument."""
    tensors, options = arguments
    options = {name: cast(value, dtype) for name, value in options.items()}
    leaves = [cast(t, dtype).detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    result = function(*leaves, **options, **more)
    value = value_of(result)
    weight = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float32).to(value.dtype).view(value.shape)
    value.backward(weight)
    # The rejected completion is no part of a likelihood: eager makes no gradient for it, and a kernel one of zeros.
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.is_floating_point()]
    return [*fields(result), *gradients]

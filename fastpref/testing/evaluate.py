"""Run a call and its backward, and convert its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref.testing.case import Layout, as_it_is

SEED = 20230529
GRADIENT = "∂"


def evaluate(
    function: Callable[..., Any], leaves: dict[str, Tensor], constants: dict[str, Any], layout: Layout = as_it_is
) -> dict[str, Tensor]:
    """Return the outputs of `function` by name, and each gradient under "∂" and the argument's name, all on the CPU.

    The incoming gradients are the same float32 numbers for every dtype and device.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    result = function(**{name: layout(leaf) for name, leaf in leaves.items()}, **constants)
    if hasattr(result, "_asdict"):
        outputs: dict[str, Tensor] = result._asdict()
    else:
        outputs = {f"result {i}": x for i, x in enumerate(result)} if isinstance(result, tuple) else {"result": result}
    generator = torch.Generator().manual_seed(SEED)
    differentiable = [value for value in outputs.values() if value.requires_grad]
    incoming = [torch.randn(value.shape, generator=generator).to(value) for value in differentiable]
    if differentiable:
        torch.autograd.backward(differentiable, incoming)
    # If the result does not depend on an argument, eager makes no gradient and a kernel may make one of zeros.
    gradients = {
        GRADIENT + name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }
    return {name: value.detach().cpu() for name, value in {**outputs, **gradients}.items()}


def cast(named: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments with floating-point tensors converted to `dtype`."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in named.items()
    }


def move(named: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return the arguments with tensors moved to `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in named.items()}

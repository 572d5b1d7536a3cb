"""How the `torch.autograd.Function`s are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wants_gradient(*arguments: Any) -> bool:
    """Whether a backward may follow. Asked outside of a Function: inside one, gradients are always off."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`; in a graph that needs no gradient, its forward.

    There Dynamo would trace the forward with a context before its arguments, `setup_context` or not. Outside of a
    graph nothing is won, and `apply` refuses the transforms that have no rule here: a tangent would be lost silently.
    """
    if torch.compiler.is_compiling() and not wants_gradient(*arguments):
        return function.forward(*arguments)
    return function.apply(*arguments)

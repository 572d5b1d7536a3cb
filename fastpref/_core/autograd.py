"""Helpers that call the `torch.autograd.Function`s and reject the transforms that those do not support."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch._functorch.utils import unwrap_dead_wrappers
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has numbers to read: it is not in a graph, on the meta device, or fake."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor))


def transformed() -> bool:
    """Return whether a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active()


def enter(*tensors: Any) -> tuple[Any, ...]:
    """Reject vmap and forward mode; return the tensors, as views when compiling under `torch.func`.

    Raises:
        NotImplementedError: `torch.vmap` maps over one of the tensors, or forward mode differentiates with respect to
            one.
    """
    forward_mode = forward_ad._current_level >= 0
    if not transformed() and not forward_mode:
        return tensors
    compiling = torch.compiler.is_compiling()
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if not compiling and any(_is_mapped_over(tensor) for tensor in given):
        raise NotImplementedError(
            "fastpref does not support vmap: make the mapped dimension part of the batch, or call once for each element"
        )
    if forward_mode and (compiling or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)):
        raise NotImplementedError(
            "fastpref has no forward-mode derivative (jvp): differentiate in reverse mode, or call the function of the "
            "same name in fastpref.reference, which is plain PyTorch"
        )
    # In a graph, the inputs that torch.func differentiates do not report that they require a gradient; their views do.
    return tuple(x.view_as(x) if compiling and isinstance(x, Tensor) else x for x in tensors)


def _is_mapped_over(tensor: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def wants_gradient(*arguments: Any) -> bool:
    """Return whether a backward may follow. Call it outside of a Function: inside one, gradients are always off."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Function's backward that raises when a caller asks for its derivative.

    PyTorch's decorator of this name raises only where the upstream gradient requires a gradient. Elsewhere it returns
    the gradient as a constant, and a gradient penalty would be trained with only a part of its gradient.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        # torch.func always builds the graph of second derivatives.
        if not torch.compiler.is_compiling() and not transformed():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, and fastpref's functions are once_differentiable: call "
                "the function of the same name in fastpref.reference, which is plain PyTorch"
            )
        return once(ctx, *grads)

    return call


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Run `function.apply`; in a graph that needs no gradient, run only the function's forward.

    In such a graph, Dynamo would pass the forward a context as its first argument, even if the Function has a
    `setup_context`. Outside of a graph, `apply` rejects the transforms that the Function has no rule for; the forward
    alone would silently drop a tangent.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and not wants_gradient(*arguments):
        return function.forward(*arguments)
    # This reads the flag because before torch 2.12, Dynamo takes is_exporting() to be True in every graph.
    if torch.compiler._is_exporting_flag:
        raise NotImplementedError(
            "torch.export would keep the forward and lose the gradient: export under torch.no_grad()"
        )
    if compiling or transformed():
        return function.apply(*arguments)
    # Function.apply first binds the arguments to the forward's signature, which takes longer than the rest of the call.
    # The apply of its base class does not bind them. From torch 2.14 on, both bind them in C++.
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]

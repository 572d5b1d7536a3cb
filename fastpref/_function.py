"""How the `torch.autograd.Function`s are called."""

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
    """Whether there are numbers to read: not in a graph, nor on the meta device, nor in a fake tensor."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor))


def transformed() -> bool:
    """Whether this is called under a transform of `torch.func`."""
    return torch._C._are_functorch_transforms_active()


def enter(*tensors: Any) -> tuple[Any, ...]:
    """What is differentiable of a public function's arguments, in a form in which transforms of `torch.func` show.

    Raises:
        NotImplementedError: `torch.vmap` goes over one of them, or forward mode differentiates by one.
    """
    forward_mode = forward_ad._current_level >= 0
    if not transformed() and not forward_mode:
        return tensors
    compiling = torch.compiler.is_compiling()
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if not compiling and any(_is_mapped_over(tensor) for tensor in given):
        raise NotImplementedError(
            "fastpref does not go under vmap: give what it maps over as more of the batch, or call once for each"
        )
    if forward_mode and (compiling or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)):
        raise NotImplementedError(
            "fastpref has no forward-mode derivative, no jvp: differentiate in reverse mode, or call the function of "
            "this name in fastpref.reference, which is plain PyTorch"
        )
    # In a graph, what torch.func differentiates by does not itself say that it requires a gradient; a view of it does.
    return tuple(x.view_as(x) if compiling and isinstance(x, Tensor) else x for x in tensors)


def _is_mapped_over(tensor: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def wants_gradient(*arguments: Any) -> bool:
    """Whether a backward may follow. Asked outside of a Function: inside one, gradients are always off."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward that has no derivative, and refuses to be part of a graph that asks for one.

    PyTorch's own of this name raises only where the upstream gradient leads on; elsewhere the gradient is a constant to
    it, and a gradient penalty would be trained by a part of its gradient.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        # torch.func always makes that graph.
        if not torch.compiler.is_compiling() and not transformed():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, and fastpref's functions are once_differentiable: call "
                "the function of this name in fastpref.reference, which is plain PyTorch"
            )
        return once(ctx, *grads)

    return call


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`; in a graph that needs no gradient, its forward.

    There Dynamo would trace the forward with a context before its arguments, `setup_context` or not. Outside of a
    graph nothing is won, and `apply` refuses the transforms that have no rule here: a tangent would be lost silently.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and not wants_gradient(*arguments):
        return function.forward(*arguments)
    # The flag and not is_exporting(), which Dynamo takes to be True in every graph before torch 2.12.
    if torch.compiler._is_exporting_flag:
        raise NotImplementedError(
            "torch.export would keep the forward and lose the gradient: export under torch.no_grad()"
        )
    if compiling or transformed():
        return function.apply(*arguments)
    # Function.apply first binds the arguments to the forward's signature, which takes longer than the rest of it. Its
    # base class does not. From torch 2.14 on, both bind them in C++.
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]

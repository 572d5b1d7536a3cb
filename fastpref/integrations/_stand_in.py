"""Copies of modules that take their place during one call, so that no call changes what other calls share.

A copy is shallow: it has the module's parameters, buffers and children. Its hooks are given the module itself, because
FSDP2 keeps account of which modules it has seen.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.integrations._rebind import rebind

# These shard, gather and move a module's weights. They act on any output, and must see the one that has the gradients.
_RUNTIMES = ("torch.distributed.", "deepspeed.", "accelerate.")
# These place logits as a layout says; log-probs are whole on every rank.
_LAYOUTS = ("torch.distributed.tensor._api", "transformers.integrations.tensor_parallel")
# Attributes that a copy does not share with its module.
_OWN = ("_modules", "_forward_pre_hooks", "_forward_hooks", "_compiled_call_impl", "forward", "_old_forward")


def forward_name(module: nn.Module) -> str:
    """Return the name of the attribute that holds a module's own forward."""
    # accelerate's hooks are a forward around the one they keep. Not hasattr: PEFT's wrappers pass on attributes.
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def _copy(module: nn.Module) -> Any:
    made: Any = object.__new__(type(module))  # not copy.copy, which torch.compile cannot trace
    made.__dict__.update(module.__dict__)
    made.__dict__["_compiled_call_impl"] = None  # of nn.Module.compile, and bound to the module
    if "_old_forward" in module.__dict__:
        made.__dict__["_old_forward"] = rebind(module.__dict__["_old_forward"], module, made)
    return made


def _callable_copy(module: nn.Module) -> Any:
    """Return a copy to be called: with forwards of its own, and hooks that are given the module."""
    made = _copy(module)
    if "forward" in module.__dict__:
        made.__dict__["forward"] = rebind(module.__dict__["forward"], module, made)
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        made.__dict__[hooks] = OrderedDict(
            (key, _with_module(hook, module)) for key, hook in module.__dict__[hooks].items()
        )
    return made


def _with_module(hook: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    return lambda _, *args: hook(module, *args)


def _defined_in(hooks: Mapping[int, Callable[..., Any]], wanted: Callable[[str], bool]) -> dict[int, Any]:
    """Return the hooks that are defined in a module of Python whose name is `wanted`."""
    found = {}
    for key, hook in hooks.items():
        function: Any = hook.func if isinstance(hook, functools.partial) else hook
        if wanted(getattr(function, "__module__", None) or ""):
            found[key] = hook
    return found


def users_hooks(hooks: Mapping[int, Callable[..., Any]]) -> dict[int, Any]:
    """Return those of a module's hooks that no distributed runtime and no parallel layout registered."""
    return _defined_in(hooks, lambda where: not where.startswith((*_RUNTIMES, *_LAYOUTS)))


def stand_in(module: nn.Module, forward: Callable[..., Any], last: Callable[..., Any]) -> Any:
    """Return a copy of `module` that runs `forward`, between those hooks of the module that manage its weights.

    Args:
        module: it is left as it is.
        forward: called with what the module is called with.
        last: `last(module, args, output)`, called after all hooks; what it returns, unless None, is the output.

    Raises:
        NotImplementedError: the module has hooks of its backward, which would be given gradients of logits.
    """
    backward = [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
    if backward:
        raise NotImplementedError(
            f"the head has a backward hook, {backward[0]}, which wants the gradient of logits, and a scored call makes "
            "no logits; remove the hook for scored calls"
        )
    made = _callable_copy(module)
    made.__dict__[forward_name(module)] = forward
    managing = _defined_in(
        module._forward_hooks, lambda where: where.startswith(_RUNTIMES) and not where.startswith(_LAYOUTS)
    )
    after = [(key, _with_module(hook, module)) for key, hook in managing.items()]
    made.__dict__["_forward_hooks"] = OrderedDict([*after, ("fastpref", _with_module(last, module))])
    return made


def run_users_hooks(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
    """Return what the user's forward hooks make of `logits`, which stand for the module's output.

    A hook may read what the module was given, and may cast what it returns.

    Raises:
        NotImplementedError: a hook returns something else.
    """
    for key, hook in users_hooks(module._forward_hooks).items():
        kwargs = ({},) if key in module._forward_hooks_with_kwargs else ()
        given = logits.clone()
        found = hook(module, args, *kwargs, given)
        found = given if found is None else found
        if not _same(found, logits):
            raise NotImplementedError(
                f"the head's forward hook {hook} changes the logits, and a scored call follows only hooks that cast "
                "them. Remove the hook; if it scales or caps the logits, pass temperature= at the call, or logit_scale="
                " or softcap= to attach"
            )
        logits = found
    return logits


def _same(found: Any, logits: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != logits.shape or not found.is_floating_point():
        return False
    close = {"rtol": torch.finfo(found.dtype).eps, "atol": 0.0, "equal_nan": True}
    return bool(torch.isclose(found.double(), logits.double(), **close).all())


def paths_to(model: Any, module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return every path of attribute names by which `model` holds `module`."""
    names = [name for name, found in model.named_modules(remove_duplicate=False) if found is module]
    return tuple(tuple(name.split(".")) for name in names)


def leads_to(model: nn.Module, path: Sequence[str], module: nn.Module) -> bool:
    """Return whether `model` holds `module` at `path`."""
    found: nn.Module | None = model
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found is module


def graft(model: nn.Module, paths: Sequence[Sequence[str]], made: nn.Module) -> Any:
    """Return a copy of `model` that holds `made` at `paths`, with copies of the modules on the way there."""
    copied = _copy(model)
    copied.__dict__["_modules"] = _grafted(model, paths, made)
    return copied


def _grafted(model: nn.Module, paths: Sequence[Sequence[str]], made: nn.Module) -> dict[str, nn.Module | None]:
    children = dict(model._modules)
    for name in dict.fromkeys(path[0] for path in paths):
        rest = [path[1:] for path in paths if path[0] == name]
        child = model._modules[name]
        assert child is not None
        if rest[0]:
            children[name] = _callable_copy(child)
            children[name].__dict__["_modules"] = _grafted(child, rest, made)
        else:
            children[name] = made
    return children


def keep_attributes(copied: nn.Module, model: nn.Module, paths: Sequence[Sequence[str]]) -> None:
    """Set on `model` what its forward set on `copied`, made by `graft`: attributes, not parameters or modules."""
    for name, value in copied.__dict__.items():
        if name not in _OWN and (name not in model.__dict__ or model.__dict__[name] is not value):
            model.__dict__[name] = value
    for name in dict.fromkeys(path[0] for path in paths if len(path) > 1):
        inner, child = copied._modules[name], model._modules[name]
        assert inner is not None
        assert child is not None
        keep_attributes(inner, child, [path[1:] for path in paths if path[0] == name])

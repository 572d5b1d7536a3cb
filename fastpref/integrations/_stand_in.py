"""Copies of modules that take their place during one call, so that no call changes what other calls share.

A copy is shallow: it has the module's parameters, buffers and children. Its hooks are given the module itself, because
FSDP2 keeps account of which modules it has seen.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

# These shard, gather and move a module's weights. They act on any output, and must see the one that has the gradients.
_RUNTIMES = ("torch.distributed.", "deepspeed.", "accelerate.")
# These place logits as a layout says; log-probs are whole on every rank.
_LAYOUTS = ("torch.distributed.tensor._api", "transformers.integrations.tensor_parallel")


def rebind(value: Any, module: nn.Module, made: nn.Module) -> Any:
    """Return `value`, or a copy of it that holds `made` where it holds `module`.

    Forwards that were put on a module hold it in one of these ways: a bound method, a partial, as accelerate makes one,
    and a function around either, as TRL's and most patches are.
    """
    if value is module:
        return made
    if isinstance(value, MethodType):
        # A partial and not a method, which torch.compile cannot make.
        owner = rebind(value.__self__, module, made)
        return value if owner is value.__self__ else functools.partial(rebind(value.__func__, module, made), owner)
    if isinstance(value, functools.partial):
        function, *args = (rebind(part, module, made) for part in (value.func, *value.args))
        return functools.partial(function, *args, **value.keywords)
    if isinstance(value, FunctionType) and value.__closure__:
        found = [cell.cell_contents for cell in value.__closure__]
        cells = tuple(rebind(held, module, made) for held in found)
        if any(new is not old for new, old in zip(cells, found, strict=True)):
            closure = tuple(map(CellType, cells))
            copied = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
            copied.__kwdefaults__ = value.__kwdefaults__
            return copied
    return value


def _copy(module: nn.Module) -> Any:
    made: Any = object.__new__(type(module))  # not copy.copy, which torch.compile cannot trace
    made.__dict__.update(module.__dict__)
    made.__dict__["_compiled_call_impl"] = None  # of nn.Module.compile, and bound to the module
    if "_old_forward" in module.__dict__:  # accelerate's hooks keep the forward that they run around here
        made.__dict__["_old_forward"] = rebind(module.__dict__["_old_forward"], module, made)
    return made


def _with_module(hook: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    return lambda _, *args: hook(module, *args)


def _hooks(module: nn.Module, wanted: Callable[[str], bool]) -> dict[int, Callable[..., Any]]:
    """Return the module's forward hooks that are defined where `wanted` says."""
    found = {}
    for key, hook in module._forward_hooks.items():
        function: Any = hook.func if isinstance(hook, functools.partial) else hook
        if wanted(getattr(function, "__module__", None) or ""):
            found[key] = hook
    return found


def users_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the module's forward hooks that neither manage its weights nor place its output on ranks."""
    return _hooks(module, lambda where: not where.startswith((*_RUNTIMES, *_LAYOUTS)))


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
    made = _copy(module)
    made.__dict__["_old_forward" if hasattr(module, "_hf_hook") else "forward"] = forward
    if hasattr(module, "_hf_hook"):
        made.__dict__["forward"] = rebind(module.__dict__["forward"], module, made)
    before = {key: _with_module(hook, module) for key, hook in module._forward_pre_hooks.items()}
    managing = _hooks(module, lambda where: where.startswith(_RUNTIMES) and not where.startswith(_LAYOUTS))
    after = {key: _with_module(hook, module) for key, hook in managing.items()}
    made.__dict__["_forward_pre_hooks"] = OrderedDict(before)
    made.__dict__["_forward_hooks"] = OrderedDict([*after.items(), ("fastpref", _with_module(last, module))])
    return made


def run_users_hooks(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
    """Return what the user's forward hooks make of `logits`, which stand for the module's output.

    A hook may read what the module was given, and may cast what it returns.

    Raises:
        NotImplementedError: a hook returns something else.
    """
    for key, hook in users_hooks(module).items():
        kwargs = ({},) if key in module._forward_hooks_with_kwargs else ()
        given = logits.clone()
        found = hook(module, args, *kwargs, given)
        found = given if found is None else found
        if not _same(found, logits):
            raise NotImplementedError(
                f"the head's forward hook {hook} changes the logits, and a scored call makes none that it could change;"
                " only a hook that casts them is followed. Remove it, or say what it does: temperature= at the call, "
                "logit_scale= or softcap= of attach"
            )
        logits = found
    return logits


def _same(found: Any, logits: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != logits.shape or not found.is_floating_point():
        return False
    allowed = torch.finfo(found.dtype).eps * logits.double().abs()
    return bool(((found.double() - logits.double()).abs() <= allowed).all())


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
    children = dict(model._modules)
    for name in dict.fromkeys(path[0] for path in paths):
        rest = [path[1:] for path in paths if path[0] == name]
        if not rest[0]:
            children[name] = made
            continue
        child = model._modules[name]
        assert child is not None
        copied = graft(child, rest, made)
        if "forward" in child.__dict__:
            copied.__dict__["forward"] = rebind(child.__dict__["forward"], child, copied)
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            copied.__dict__[hooks] = OrderedDict(
                (key, _with_module(hook, child)) for key, hook in child.__dict__[hooks].items()
            )
        children[name] = copied
    copied = _copy(model)
    copied.__dict__["_modules"] = children
    return copied

"""Copy modules for one call, so that no call changes a model that other calls share.

A copy is shallow: it shares the module's parameters, buffers and children. Its hooks are called with the original
module, because FSDP2 tracks the modules that its hooks are called with.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.integrations.transformers._rebind import rebind

# Hooks from these packages shard, gather and move a module's weights. They accept any output, and must get the one that
# has the gradients.
_RUNTIMES = ("torch.distributed.", "deepspeed.", "accelerate.")
# Hooks from these modules redistribute logits across ranks; log-probs are complete on every rank.
_LAYOUTS = ("torch.distributed.tensor._api", "transformers.integrations.tensor_parallel")
# Attributes that a copy does not share with the original.
_OWN = ("_modules", "_forward_pre_hooks", "_forward_hooks", "_compiled_call_impl", "forward", "_old_forward")


def forward_name(module: nn.Module) -> str:
    """Return the name of the attribute that holds a module's own forward."""
    # accelerate wraps the forward and keeps the original. hasattr would not do: PEFT's wrappers delegate attributes.
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def _copy(module: nn.Module) -> Any:
    made: Any = object.__new__(type(module))  # not copy.copy, which torch.compile cannot trace
    made.__dict__.update(module.__dict__)
    made.__dict__["_compiled_call_impl"] = None  # set by nn.Module.compile, and bound to the original
    if "_old_forward" in module.__dict__:
        made.__dict__["_old_forward"] = rebind(module.__dict__["_old_forward"], module, made)
    return made


def _callable_copy(module: nn.Module) -> Any:
    """Return a copy that can be called: its forward refers to the copy, and its hooks are called with the original."""
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
    """Return the hooks whose Python module has a `wanted` name."""
    found = {}
    for key, hook in hooks.items():
        function: Any = hook.func if isinstance(hook, functools.partial) else hook
        if wanted(getattr(function, "__module__", None) or ""):
            found[key] = hook
    return found


def users_hooks(hooks: Mapping[int, Callable[..., Any]]) -> dict[int, Any]:
    """Return a module's hooks without those of distributed runtimes and parallel layouts."""
    return _defined_in(hooks, lambda where: not where.startswith((*_RUNTIMES, *_LAYOUTS)))


def copy_with_forward(module: nn.Module, forward: Callable[..., Any], last: Callable[..., Any]) -> Any:
    """Return a copy of `module` that runs `forward`, with the module's pre-hooks and the hooks that manage its weights.

    Args:
        module: the original, which is not changed.
        forward: called with the arguments of the call.
        last: `last(module, args, output)` is called after all hooks; its result, unless None, replaces the output.

    Raises:
        NotImplementedError: the module has backward hooks, which expect the gradient of logits.
    """
    backward = [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
    if backward:
        raise NotImplementedError(
            f"the head has a backward hook, {backward[0]}, which expects the gradient of logits, and a scored call "
            "computes no logits; remove the hook for scored calls"
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
    """Run the user's forward hooks on `logits` as the module's output, and return the result.

    A hook may read its arguments, and may return the logits in another dtype.

    Raises:
        NotImplementedError: a hook changes the logits.
    """
    for key, hook in users_hooks(module._forward_hooks).items():
        kwargs = ({},) if key in module._forward_hooks_with_kwargs else ()
        given = logits.clone()
        found = hook(module, args, *kwargs, given)
        found = given if found is None else found
        if not _same(found, logits):
            raise NotImplementedError(
                f"the head's forward hook {hook} changes the logits, and a scored call supports only hooks that cast "
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
    """Return every path of attribute names that leads from `model` to `module`."""
    names = [name for name, found in model.named_modules(remove_duplicate=False) if found is module]
    return tuple(tuple(name.split(".")) for name in names)


def leads_to(model: nn.Module, path: Sequence[str], module: nn.Module) -> bool:
    """Return whether `path` leads from `model` to `module`."""
    found: nn.Module | None = model
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found is module


def copy_with_module(model: nn.Module, paths: Sequence[Sequence[str]], made: nn.Module) -> Any:
    """Return a copy of `model` with `made` at `paths`, and with copies of the modules on the way there."""
    copied = _copy(model)
    copied.__dict__["_modules"] = _children(model, paths, made)
    return copied


def _children(model: nn.Module, paths: Sequence[Sequence[str]], made: nn.Module) -> dict[str, nn.Module | None]:
    children = dict(model._modules)
    for name in dict.fromkeys(path[0] for path in paths):
        rest = [path[1:] for path in paths if path[0] == name]
        child = model._modules[name]
        assert child is not None
        if rest[0]:
            children[name] = _callable_copy(child)
            children[name].__dict__["_modules"] = _children(child, rest, made)
        else:
            children[name] = made
    return children


def keep_attributes(copied: nn.Module, model: nn.Module, paths: Sequence[Sequence[str]]) -> None:
    """Set on `model` the attributes that its forward set on `copied`, which `copy_with_module` made at `paths`."""
    for name, value in copied.__dict__.items():
        if name not in _OWN and (name not in model.__dict__ or model.__dict__[name] is not value):
            model.__dict__[name] = value
    for name in dict.fromkeys(path[0] for path in paths if len(path) > 1):
        inner, child = copied._modules[name], model._modules[name]
        assert inner is not None
        assert child is not None
        keep_attributes(inner, child, [path[1:] for path in paths if path[0] == name])

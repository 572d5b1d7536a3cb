"""Copy a function so that the copy refers to another module."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def rebind(value: Any, module: nn.Module, made: nn.Module) -> Any:
    """Return a copy of `value` that refers to `made` where `value` refers to `module`; `value` itself if it does not.

    A forward that was set on a module refers to it in one of these ways: a bound method; a partial, such as
    accelerate's; a function that wraps either, such as TRL's and most patches, in its closure or its defaults. A copied
    function shares everything else with the original: the other variables of its closure, and its attributes.
    """
    if value is module:
        return made
    if isinstance(value, MethodType) and value.__self__ is module and not _parts(value.__func__):
        return functools.partial(value.__func__, made)  # torch.compile cannot create a method
    copies: dict[int, Any] = {id(module): made}
    holders = _holders(value, module)

    def copy(held: Any) -> Any:
        if id(held) in copies:
            return copies[id(held)]
        if id(held) not in holders:
            return held
        if isinstance(held, MethodType):
            made = functools.partial(copy(held.__func__), copy(held.__self__))
        elif isinstance(held, functools.partial):
            keywords = {name: copy(part) for name, part in held.keywords.items()}
            made = functools.partial(copy(held.func), *map(copy, held.args), **keywords)
        else:
            return copy_function(held)
        copies[id(held)] = made
        return made

    def copy_function(held: FunctionType) -> FunctionType:
        old = held.__closure__ or ()
        new = [CellType() if _is_filled(cell) and id(cell.cell_contents) in holders else cell for cell in old]
        # Registered before its parts are copied, because they may refer to it.
        made = copies[id(held)] = FunctionType(held.__code__, held.__globals__, held.__name__, None, tuple(new))
        for cell, filled in zip(new, old, strict=True):
            if cell is not filled:
                cell.cell_contents = copy(filled.cell_contents)
        made.__defaults__ = held.__defaults__ and tuple(map(copy, held.__defaults__))
        made.__kwdefaults__ = held.__kwdefaults__ and {name: copy(part) for name, part in held.__kwdefaults__.items()}
        made.__dict__ = held.__dict__
        for name in ("__module__", "__qualname__", "__doc__"):
            setattr(made, name, getattr(held, name))
        return made

    return copy(value)


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that is not assigned yet
        return False
    return True


def _parts(value: Any) -> list[Any]:
    """Return the objects that a function, method or partial refers to."""
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return []


def _reached(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """Yield `value` and all that it refers to, directly or through others, each once."""
    if id(value) not in seen:
        seen[id(value)] = value
        yield value
        for part in _parts(value):
            yield from _reached(part, seen)


def _holders(value: Any, module: nn.Module) -> set[int]:
    """Return the ids of `module` and of all that refer to it, among what `value` refers to."""
    reached, found = list(_reached(value, {})), {id(module)}
    while True:
        more = {id(held) for held in reached if any(id(part) in found for part in _parts(held))}
        if more <= found:
            return found
        found |= more

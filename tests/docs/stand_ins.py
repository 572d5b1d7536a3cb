"""Imitate trainers that need GPUs to install, for pages that patch them."""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any

import pytest

from fastpref.integrations import _replace
from fastpref.integrations.openrlhf import _patch as openrlhf
from fastpref.integrations.verl import _patch as verl

INSTALLED = {"openrlhf": "0.11.2", "verl": "0.9.1"}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Create what `patch()` checks: functions with the replaced signatures, and functions that use them."""
    own = _replace.version
    monkeypatch.setattr(_replace, "version", lambda name: INSTALLED.get(name) or own(name))
    for library in (openrlhf, verl):
        for path, ours in library.OBJECTS.items():
            module, name = path.split(":")
            setattr(_module(module, monkeypatch), name, _copied(ours))
        for path, names in library.KNOWN.uses.items():
            module, qualified = path.split(":")
            *owners, name = qualified.split(".")
            holder: Any = _module(module, monkeypatch)
            for owner in owners:
                setattr(holder, owner, type(owner, (), {}))
                holder = getattr(holder, owner)
            scope: dict[str, Any] = {}
            exec(f"def {name}(): return {', '.join(names)}", scope)
            setattr(holder, name, scope[name])


def _module(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return sys.modules[path]


def _copied(ours: Any) -> Any:
    if isinstance(ours, type):
        return type(ours.__name__, (ours,), {})
    return FunctionType(ours.__code__, ours.__globals__, ours.__name__, ours.__defaults__, ours.__closure__)

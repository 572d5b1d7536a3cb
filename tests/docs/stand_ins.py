"""Modules in the place of trainers that need GPUs to install, for pages that patch them."""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any

import pytest

from fastpref.integrations import _seam, openrlhf, verl

INSTALLED = {"openrlhf": "0.11.2", "verl": "0.9.1"}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give `patch()` what it looks for: functions of the signatures that it replaces, and those that use them."""
    own = _seam.version
    monkeypatch.setattr(_seam, "version", lambda name: INSTALLED.get(name) or own(name))
    for seam in (openrlhf._seam, verl._seam):
        for path, objects in seam.places.items():
            for ours in objects:
                setattr(_module(path, monkeypatch), ours.__name__, _copied(ours))
        for place, names in seam.users.items():
            path, qualified = place.split(":")
            *owners, name = qualified.split(".")
            holder: Any = _module(path, monkeypatch)
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

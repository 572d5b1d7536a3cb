"""Imitate libraries that are not installed, and compare results and gradients with formulas in plain PyTorch."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations import _replace

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])


def install(monkeypatch: pytest.MonkeyPatch, sources: dict[str, str], version: str) -> dict[str, Any]:
    """Put modules into `sys.modules`, made from sources by name, and make every library's version `version`."""
    modules: dict[str, Any] = {}
    for name, source in sources.items():
        modules[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
        exec(source, vars(modules[name]))
    monkeypatch.setattr(_replace, "version", lambda name: version)
    return modules


def signature(function: Any) -> str:
    """Return a function's signature without annotations, such as "(logits, temperature=1.0)"."""
    return f"({', '.join(_replace.parameters(function))})"


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def assert_alike(found: Tensor, wanted: Tensor, *inputs: Tensor) -> None:
    """Compare values, and the gradients of a weighted sum."""
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    # The wanted gradients first: the backward of `found` may write over the logits.
    b, a = (torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (wanted, found))
    for ours, theirs in zip(a, b, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

"""Keep the precision of our own products, whatever the process around them has set.

An autocast would round their operands. `torch.set_float32_matmul_precision("high")` leaves a float32 product ten bits
of mantissa on a GPU, and "medium" leaves it seven on a CPU with AMX, which moves a log-prob by 1e-2.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])
_FULL = ("highest", "ieee", "none", None)
_lock = threading.Lock()
_holders = 0
_saved: tuple[str | None, ...] = ()


def _backends() -> list[Any]:
    """Return the parts of PyTorch that have a precision of their own, which is since 2.9."""
    found = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def _setting() -> tuple[str | None, ...]:
    """Return the process's precision, None where PyTorch cannot tell, and that of each backend."""
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for one backend and not for the other
        whole = None
    return whole, *(backend.fp32_precision for backend in _backends())


@contextmanager
def full_float32() -> Iterator[None]:
    """Make float32 products exact inside this context, and leave the process's setting as it was.

    The setting is the whole process's. So the first thread that comes keeps it and the last that goes restores it, and
    a product of another thread's in between is exact too.
    """
    global _holders, _saved
    with _lock:
        if _holders == 0:
            _saved = _setting()
            if any(value not in _FULL for value in _saved):
                torch.set_float32_matmul_precision("highest")
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and any(value not in _FULL for value in _saved):
                whole, *each = _saved
                torch.set_float32_matmul_precision(whole or "highest")
                for backend, value in zip(_backends(), each, strict=True):
                    backend.fp32_precision = value


def own_precision(function: _Function) -> _Function:
    """Call an operator's implementation outside autocast and with exact float32 products."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        device = next(value.device.type for value in arguments if isinstance(value, Tensor))
        with ExitStack() as stack:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(full_float32())
            return function(*arguments)

    return call  # type: ignore[return-value]

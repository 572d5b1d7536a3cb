"""Keep the precision of our own products, whatever the process around them has set.

An autocast would round their operands. `torch.set_float32_matmul_precision("high")` leaves a float32 product ten bits
of mantissa on a GPU, and "medium" leaves it seven on a CPU with AMX, which moves a log-prob by 1e-2.
`torch.backends.cuda.matmul.allow_fp16_accumulation` has a GPU sum the terms of a float16 product in float16. And by
default a GPU may round the parts of one sum that it splits over programs, where the result has 16 bits.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])
_FULL = frozenset(("highest", "ieee", "none", None, False, (False, False)))
_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_lock = threading.Lock()
_holders = 0
_saved: tuple[Any, ...] | None = None


def _backends() -> list[tuple[Any, Any]]:
    """Return the backends with a precision setting (from PyTorch 2.9 on), each with the one that it falls back to."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return []
    mkldnn: Any = torch.backends.mkldnn
    return [(torch.backends.cuda.matmul, torch.backends), (mkldnn.matmul, mkldnn)]


_BACKENDS = _backends()


def _forbids_splits(name: str) -> bool:
    """Return whether a sum must not be split into parts, which a process can ask for from PyTorch 2.10 on."""
    return not getattr(torch.backends.cuda.matmul, f"{name}_split_k", True)


def _reduction(name: str) -> Any:
    """Return whether parts of a sum may be rounded, in a pair with False if a sum must not be split."""
    rounds = getattr(torch.backends.cuda.matmul, name)
    return (rounds, False) if _forbids_splits(name) else rounds


def _setting() -> tuple[Any, ...]:
    """Return the process's precision, how a GPU sums 16-bit products, and each backend's precision.

    The first is None where PyTorch cannot tell.
    """
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for one backend and not for the other
        whole = None
    accumulates = torch.backends.cuda.matmul.allow_fp16_accumulation
    return whole, accumulates, *map(_reduction, _REDUCTIONS), *[backend.fp32_precision for backend, _ in _BACKENDS]


def _restore(whole: str | None, accumulates: bool, fp16: Any, bf16: Any, *each: str | None) -> None:
    torch.set_float32_matmul_precision(whole or "highest")
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_accumulation = accumulates
    for name, value in zip(_REDUCTIONS, (fp16, bf16), strict=True):
        setattr(matmul, name, value)
    for (backend, parent), value in zip(_BACKENDS, each, strict=True):
        # "none" makes a backend follow the setting above it, as it did before.
        backend.fp32_precision = "none" if value == parent.fp32_precision else value


def _is_full() -> bool:
    """Return whether the process asks for exact products of float32 results.

    It is False while another thread has raised the precision, because that thread will restore a lower one.
    """
    with _lock:
        whole, accumulates, _, _, *each = _setting()
        return _saved is None and _FULL.issuperset((whole, accumulates, *each))


@contextmanager
def full_float32() -> Iterator[None]:
    """Make products sum in exact float32 inside this context, and leave the process's setting as it was.

    The setting belongs to the whole process. So the first thread that enters saves it, and the last that leaves
    restores it. Products of other threads in between are exact too.
    """
    global _holders, _saved
    with _lock:
        setting = _setting()
        if not _FULL.issuperset(setting):
            # The setting to restore: what another thread has set since the first one entered, else what the first one
            # saved.
            earlier = setting if _saved is None else _saved
            _saved = tuple(old if new in _FULL else new for old, new in zip(earlier, setting, strict=True))
            torch.set_float32_matmul_precision("highest")
            torch.backends.cuda.matmul.allow_fp16_accumulation = False
            for name in _REDUCTIONS:
                # If the process forbids splitting sums, keep that.
                setattr(torch.backends.cuda.matmul, name, (False, False) if _forbids_splits(name) else False)
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and _saved is not None:
                _restore(*_saved)
                _saved = None


def own_precision(function: _Function) -> _Function:
    """Call an operator's implementation outside autocast and with exact float32 products."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        device = next(value.device.type for value in arguments if isinstance(value, Tensor))
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return call(*arguments)
        if _is_full():
            return function(*arguments)
        with full_float32():
            return function(*arguments)

    return call  # type: ignore[return-value]

"""CPU operators: native C++ where a compiler is at hand, chunked PyTorch where none is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpref_kernels import eager
from fastpref_kernels.cpu.build import loaded, native

__all__ = ["loaded", "logprobs", "native", "write_gradient"]


def _implementation() -> Any:
    return native() or eager


def logprobs(*arguments: Any) -> tuple[Tensor, ...]:
    """`fastpref::logprobs`."""
    return _implementation().logprobs(*arguments)


def write_gradient(*arguments: Any) -> None:
    """Write the gradient of logits to the first argument, which may be the logits themselves."""
    _implementation().write_gradient(*arguments)

"""CPU operators: native C++ where a compiler is at hand, chunked PyTorch where none is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpref_kernels import eager
from fastpref_kernels.cpu.build import native


def _implementation() -> Any:
    return native() or eager


def logprobs(*arguments: Any) -> tuple[Tensor, ...]:
    """`fastpref::logprobs`."""
    return _implementation().logprobs(*arguments)


def logprobs_backward(*arguments: Any) -> Tensor:
    """`fastpref::logprobs_backward`."""
    return _implementation().logprobs_backward(*arguments)


def logprobs_backward_(*arguments: Any) -> None:
    """`fastpref::logprobs_backward_`."""
    _implementation().logprobs_backward_(*arguments)

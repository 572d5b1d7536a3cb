"""Describe a variant that is timed: its name, its inputs, and the check of its answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastpref_kernels.triton import launches

# Bytes between two uses of the same input, so that no cache still holds it: three times the L2 of an H200.
ROTATED = 3 * 60 * 2**20
# Rows that are compared with float64.
JUDGED = 32


@dataclass
class Trial:
    """A variant with its inputs on a device.

    Attributes:
        run: the function that is timed.
        error: runs it on outputs filled with NaN and returns the largest error.
        allowed: the largest error allowed.
        gbytes: the GB that `run` must move.
        tflop: the TFLOP that `run` must compute.
        whole: whether `run` is a whole step, which is timed by the clock and has its launches counted.
    """

    run: Callable[[], object]
    error: Callable[[], float]
    allowed: float
    gbytes: float = 0.0
    tflop: float = 0.0
    whole: bool = False


@dataclass(frozen=True)
class Case:
    """A variant by name.

    Attributes:
        group: the group of the sweep.
        kernel: the kernel or step that is varied.
        dtype: of the inputs, as in "bfloat16".
        R: rows.
        V: columns.
        H: features.
        config: the name of the variant.
        current: whether fastpref uses this variant.
        make: (device, rows) -> the trial; with few rows it only compiles the kernels.
        within: replaces entries of the launch table.
        compiles: whether there is a Triton kernel to compile beforehand.
        cuda: whether only a CUDA device can run it.
        graph: whether it is captured in a CUDA graph.
        profiled: whether the launches and the host's waits of a whole step are counted.
    """

    group: str
    kernel: str
    dtype: str
    R: int
    V: int
    H: int
    config: str
    make: Callable[[str, int], Trial] = field(compare=False)
    current: bool = False
    within: Callable[[], AbstractContextManager[Any]] = field(default=contextlib.nullcontext, compare=False)
    compiles: bool = True
    cuda: bool = False
    graph: bool = False
    profiled: bool = True

    @property
    def key(self) -> tuple[str, ...]:
        """Return the fields that identify the case, as text."""
        return tuple(str(getattr(self, name)) for name in ("group", "kernel", "dtype", "R", "V", "H", "config"))

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in (self.R, self.V, self.H) if size)
        return f"{self.group}: {self.kernel} {self.dtype} {shape} {self.config}"


@contextlib.contextmanager
def replaced(key: tuple[str, int], launch: launches.Launch) -> Iterator[None]:
    """Replace an entry of the launch table."""
    with mock.patch.dict(launches.ROWS, {key: launch}):
        yield


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, as deterministic mode does, so that an unwritten output is noticed."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def copies(nbytes: int, device: str) -> int:
    """Return how many copies of an input are rotated."""
    return max(1, -(-ROTATED // max(nbytes, 1))) if device == "cuda" else 1


def normal(device: str, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return normally distributed numbers, generated on the device."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale)


def furthest_ratio(found: Tensor, truth: Tensor) -> float:
    """Return the largest difference relative to its own element; those below 1e-12 count as that large."""
    return ((found.double() - truth).abs() / truth.abs().clamp(min=1e-12)).max().item()


def furthest(found: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference; NaN if anything is NaN."""
    return (found.double() - truth).abs().max().item()

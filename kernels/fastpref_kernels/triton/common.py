"""Functions that kernels and their launchers share: numbers as arguments, devices, and arithmetic."""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@functools.lru_cache(maxsize=1024)
def split(*values: float) -> tuple[float, ...]:
    """Return two numbers for each value, which `join` adds: the value in float32, and what that leaves of it.

    Triton passes a Python float as float32, and float64 needs the rest.
    """
    return tuple(part for value in values for part in _split(value))


def _split(value: float) -> tuple[float, float]:
    try:
        (high,) = struct.unpack("f", struct.pack("f", value))
    except OverflowError:
        high = math.copysign(math.inf, value)
    return high, value - high if math.isfinite(high) else 0.0


@triton.jit
def join(high, low, ACC: tl.constexpr):
    """Return the number that `split` made two of."""
    return tl.full((), high, ACC) + tl.full((), low, ACC)


def on_device(device: torch.device) -> Any:
    """Return a context in which `device` is current: Triton launches on that. On a CPU it does nothing."""
    return contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors that may be strided or expanded as contiguous ones, for what is small, unlike logits."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def alignment(tensor: Tensor, *strides: int) -> int:
    """Return how many elements 16 bytes hold if every row starts at a multiple of 16 bytes, else 1.

    Nothing in between: how wide loads are decides which thread sums what. With loads of 8 bytes a row's bits would
    depend on where its tensor begins.

    Args:
        tensor: the tensor that the rows are in.
        strides: the distances between rows, in elements.
    """
    whole = 16 // tensor.element_size()
    return whole if math.gcd(whole, *strides) == whole and tensor.data_ptr() % 16 == 0 else 1


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return what sums of this dtype are made in: float64 for float64, float32 for all else."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def power_rate(rate, ACC: tl.constexpr):
    """Return what x is multiplied by so that `power` of it is e^(rate * x), to change the base once and not per x."""
    if tl.float64 == ACC:
        return rate
    else:
        return rate * LOG2E


@triton.jit
def power(x, ACC: tl.constexpr):
    """Return 2^x in fp32, which is what the special-function unit has, and e^x in fp64."""
    if tl.float64 == ACC:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def exp(x, ACC: tl.constexpr):
    """Return e^x."""
    return power(x * power_rate(1.0, ACC), ACC)


@triton.jit
def top2(best_a, second_a, best_b, second_b):
    """Return the two largest of two pairs, each in order. A NaN makes the second one NaN."""
    second = tl.maximum(second_a, second_b, propagate_nan=tl.PropagateNan.ALL)
    other = tl.minimum(best_a, best_b, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(best_a, best_b), tl.maximum(second, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def top2_of(x, AXIS: tl.constexpr):
    """Return the two largest numbers along an axis, -inf for a missing one. A NaN makes the second one NaN."""
    return tl.reduce((x, tl.full(x.shape, -float("inf"), x.dtype)), AXIS, top2)


@triton.jit
def log1p(x):
    """Return log(1 + x) for x >= 0. A small x keeps its digits: what 1 + x rounds away is put back to first order."""
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u


@triton.jit
def tanh(x, ACC: tl.constexpr):
    """Return tanh(x) to a few ulp of 1; in fp32, to a few ulp of its own where 1 - 2/(1 + e^2x) would cancel."""
    a = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + exp(2.0 * a, ACC))
    far = tl.where(x < 0, -far, far)
    if tl.float64 == ACC:
        return far
    else:
        s = x * x  # minimax of (tanh(x)/x - 1)/x^2 on [0, 0.55], relative error of tanh 1e-9
        p = -0.00628247 * s + 0.02107775
        p = p * s - 0.05385386
        p = p * s + 0.13332602
        p = p * s - 0.33333318
        return tl.where(a < 0.55, x + x * s * p, far)

"""Numbers of 50 digits, which the oracles compute with, and derivatives of functions of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mpmath import MPContext
from torch import Tensor

mp = MPContext()
mp.dps = 50

Number = Any  # mpmath has no types
Numbers = list[Any]


def exact(values: Iterable[float]) -> Numbers:
    """Return floats, exactly."""
    return [mp.mpf(x) for x in values]


def numbers(values: Tensor) -> Numbers:
    """Return the elements of a tensor of one dimension, exactly."""
    return exact(values.detach().double().tolist())


def rows(values: Tensor) -> list[Numbers]:
    """Return the elements of a tensor of two dimensions, exactly, a list a row."""
    return [numbers(row) for row in values]


def sigmoid(x: Number) -> Number:
    """Return σ(x)."""
    return 1 / (1 + mp.exp(-x))


def minus_log_sigmoid(x: Number) -> Number:
    """Return −log σ(x)."""
    return mp.log1p(mp.exp(-x))


def log_sum_exp(values: Numbers) -> Number:
    """Return log Σ exp x; −inf where every x is."""
    top = max(values)
    return top if mp.isinf(top) else top + mp.log(mp.fsum(mp.exp(x - top) for x in values))


def derivative(function: Callable[[Numbers], Number], at: Numbers) -> Numbers:
    """Return the gradient of a function of a few numbers, by central differences good to about 35 digits."""
    gradient = []
    for i, x in enumerate(at):
        step = (abs(x) or 1) * mp.mpf(10) ** -18
        up, down = (function([*at[:i], x + sign * step, *at[i + 1 :]]) for sign in (1, -1))
        gradient.append((up - down) / (2 * step))
    return gradient

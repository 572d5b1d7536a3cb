"""Per-token statistics of one row of logits in 50 digits, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.oracles.precision import Number, Numbers, log_sum_exp, mp, numbers


@dataclass(frozen=True)
class Row:
    """One scored row.

    Attributes:
        z: the logits, transformed.
        label: the index of the label.
        filter_eps: None, or the mass below which a block of columns is dropped from the gradient.
        columns: the number of columns of a block.
    """

    z: Numbers
    label: int
    filter_eps: float | None = None
    columns: int = 4096

    @property
    def probabilities(self) -> Numbers:
        """softmax(z)."""
        total = log_sum_exp(self.z)
        return [mp.exp(z - total) for z in self.z]


def transformed(
    logits: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Numbers:
    """Return z = softcap·tanh(x·logit_scale/softcap)/temperature of the logits x (V,) of one row."""
    scaled = [x * mp.mpf(logit_scale) for x in numbers(logits)]
    if softcap is not None:
        scaled = [softcap * mp.tanh(x / mp.mpf(softcap)) for x in scaled]
    return [x / mp.mpf(temperature) for x in scaled]


def logprob(row: Row) -> Number:
    """Return log softmax(z)[label]."""
    return row.z[row.label] - log_sum_exp(row.z)


def entropy(row: Row) -> Number:
    """Return −Σ p·log p, with 0·log 0 = 0."""
    return -mp.fsum(p * mp.log(p) for p in row.probabilities if p)


def log_sum_sq_probs(row: Row) -> Number:
    """Return log Σ p²."""
    return log_sum_exp([2 * z for z in row.z]) - 2 * log_sum_exp(row.z)


def top2_margin(row: Row) -> Number:
    """Return the largest z minus the second largest; +inf in a vocabulary of one entry."""
    best, *others = sorted(row.z, reverse=True)
    return best - others[0] if others else mp.inf


def dropped_mass(row: Row) -> Number:
    """Return the mass of the blocks of columns whose mass is below `filter_eps` and that do not hold the label."""
    if row.filter_eps is None:
        return mp.mpf(0)
    p, blocks = row.probabilities, range(0, len(row.z), row.columns)
    masses = {first: mp.fsum(p[first : first + row.columns]) for first in blocks}
    own = row.label // row.columns * row.columns
    return mp.fsum(mass for first, mass in masses.items() if mass < row.filter_eps and first != own)


STATISTICS: dict[str, Callable[[Row], Any]] = {
    "lse": lambda row: log_sum_exp(row.z),
    "entropy": entropy,
    "mean_logits": lambda row: mp.fsum(row.z) / len(row.z),
    "is_top1": lambda row: row.z.index(max(row.z)) == row.label,
    "log_sum_sq_probs": log_sum_sq_probs,
    "top2_margin": top2_margin,
    "dropped_mass": dropped_mass,
}

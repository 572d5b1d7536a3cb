"""List all cases, the most telling first."""

from __future__ import annotations

from benchmarks.smoke.case import SmokeCase
from benchmarks.smoke.hidden import hidden_cases
from benchmarks.smoke.kernels import kernels_cases
from benchmarks.smoke.logits import logits_cases
from benchmarks.smoke.losses import losses_cases


def every_case(device: str) -> list[SmokeCase]:
    """Return all cases by tier; those for "cpu" have fewer rows, because the interpreter is slow."""
    every = [*logits_cases(device), *hidden_cases(device), *kernels_cases(), *losses_cases(device)]
    return sorted(every, key=lambda case: case.tier)

"""The named tuples that public functions return, and the names of statistics that a call asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastpref._core.checks import check_choice, describe
from fastpref.reference.results import (
    KTOResult,
    LinearGroupLoss,
    LinearPreferenceLoss,
    PPOPolicyResult,
    PPOResult,
    PPOValueResult,
    PreferenceLoss,
    linear_group_type,
    linear_loss_type,
    result_type,
    run_time_tuple,
)
from fastpref_kernels import contract

if TYPE_CHECKING:
    from fastpref.reference.results import Logprobs as Logprobs

__all__ = [
    "LINEAR_STATISTICS",
    "STATISTICS",
    "KTOResult",
    "LinearGroupLoss",
    "LinearPreferenceLoss",
    "PPOPolicyResult",
    "PPOResult",
    "PPOValueResult",
    "PreferenceLoss",
    "check_stats",
    "linear_group_type",
    "linear_loss_type",
    "result_type",
    "run_time_tuple",
]

STATISTICS = tuple(contract.STATISTICS)
LINEAR_STATISTICS = tuple(contract.LINEAR_STATISTICS)


def check_stats(stats: object, allowed: Sequence[str] = STATISTICS) -> tuple[str, ...]:
    """Check names of statistics, each one of `allowed`, and return them as a tuple."""
    if isinstance(stats, str):
        raise TypeError(f"stats must be a tuple of names, such as ({stats!r},); got the string {stats!r}")
    if not isinstance(stats, (tuple, Sequence)):  # a tuple is told at once
        raise TypeError(f"stats must be a tuple or list of names; got {describe(stats)}")
    names = tuple(stats)
    for name in names:
        check_choice("stats", name, allowed)
    if len(set(names)) != len(names):
        raise ValueError(f"stats must not repeat a name; got {names}")
    return names

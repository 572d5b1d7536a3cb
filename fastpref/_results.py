"""The named tuples that public functions return."""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._checks import check_choice

# In the order of the operator's bits: statistic i is asked for by bit i.
STATISTICS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def _make_type(stats: tuple[str, ...]) -> Any:
    return namedtuple("Logprobs", ("logprobs", *stats))


_cached_type = cache(_make_type)


def result_type(stats: tuple[str, ...]) -> Any:
    """The named tuple class with `logprobs` first and then `stats`, in the order they were asked for."""
    # Dynamo traces through a cache with a warning, and makes the class once a graph anyway.
    return _make_type(stats) if torch.compiler.is_compiling() else _cached_type(stats)


def check_stats(stats: object) -> tuple[str, ...]:
    """Check names of statistics and return them as a tuple."""
    if isinstance(stats, str):
        raise TypeError(f"stats must be a tuple of names, such as ({stats!r},); got the string {stats!r}")
    names = tuple(stats)  # type: ignore[arg-type]
    for name in names:
        check_choice("stats", name, STATISTICS)
    if len(set(names)) != len(names):
        raise ValueError(f"stats must not repeat a name; got {names}")
    return names


class PreferenceLoss(NamedTuple):
    """What a preference loss returns.

    Attributes:
        loss: a scalar, or (B,) with `reduction="none"`. The only differentiable field.
        chosen_rewards: (B,), β(log π(chosen) − log π_ref(chosen)), detached.
        rejected_rewards: (B,), the same of the rejected completion, detached.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """(B,) chosen − rejected rewards."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracies(self) -> Tensor:
        """(B,) float: 1 where the chosen completion has the higher reward."""
        return (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype)

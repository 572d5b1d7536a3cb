"""The named tuples that public functions return."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._checks import check_choice, describe

# In the order of the operator's bits: statistic i is asked for by bit i.
STATISTICS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
# From hidden states, also the probability mass that `filter_eps` left out of a token's gradient.
LINEAR_STATISTICS = (*STATISTICS, "dropped_mass")


def _make(name: str, fields: tuple[str, ...], margins: bool) -> Any:
    if not margins:
        return namedtuple(name, fields)
    # Not a class statement: Dynamo traces this one.
    return type(name, (_Margins, namedtuple("Fields", fields)), {"__slots__": ()})


@cache
def _made(name: str, fields: tuple[str, ...], margins: bool) -> Any:
    made = _make(name, fields, margins)
    # No module holds the class: what is pickled of it says how to make it.
    made.__reduce__ = lambda self: (_again, (name, fields, margins, tuple(self)))
    return made


def _again(name: str, fields: tuple[str, ...], margins: bool, values: tuple[Any, ...]) -> Any:
    return _made(name, fields, margins)._make(values)


def run_time_tuple(name: str, fields: tuple[str, ...], margins: bool = False) -> Any:
    """The class of named tuples of this name and fields, always the same; with `margins`, it has those properties."""
    # Dynamo traces through a cache with a warning, and makes the class once a graph anyway.
    return (_make if torch.compiler.is_compiling() else _made)(name, fields, margins)


def result_type(stats: tuple[str, ...]) -> Any:
    """The named tuple class with `logprobs` first and then `stats`, in the order they were asked for."""
    return run_time_tuple("Logprobs", ("logprobs", *stats))


def check_stats(stats: object, allowed: Sequence[str] = STATISTICS) -> tuple[str, ...]:
    """Check names of statistics, each one of `allowed`, and return them as a tuple."""
    if isinstance(stats, str):
        raise TypeError(f"stats must be a tuple of names, such as ({stats!r},); got the string {stats!r}")
    if not isinstance(stats, Sequence):
        raise TypeError(f"stats must be a tuple or list of names; got {describe(stats)}")
    names = tuple(stats)
    for name in names:
        check_choice("stats", name, allowed)
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


class KTOResult(NamedTuple):
    """What `kto_loss` returns.

    Attributes:
        loss: a scalar, or (B,) with `reduction="none"`. The only differentiable field.
        rewards: (B,), β(log π(y) − log π_ref(y)), detached.
    """

    loss: Tensor
    rewards: Tensor


class LinearPreferenceLoss(NamedTuple):
    """What a preference loss from hidden states returns; statistics asked for follow.

    Attributes:
        loss: a scalar, or (B,) with `reduction="none"`. The only differentiable field.
        chosen_rewards: (B,), as in `PreferenceLoss`.
        rejected_rewards: (B,), likewise.
        chosen_logps: (B,), log π(chosen), detached.
        rejected_logps: (B,), log π(rejected), detached.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor

    margins = PreferenceLoss.margins
    accuracies = PreferenceLoss.accuracies


class LinearGroupLoss(NamedTuple):
    """What a loss of groups from hidden states returns; statistics asked for follow.

    Attributes:
        loss: a scalar, or (G,) with `reduction="none"`. The only differentiable field.
        logps: (G, K), the log-prob of member k of group g, detached.
    """

    loss: Tensor
    logps: Tensor


class _Margins:
    """The properties of `PreferenceLoss`, for named tuples made at run time."""

    __slots__ = ()
    margins = PreferenceLoss.margins
    accuracies = PreferenceLoss.accuracies


def linear_loss_type(stats: tuple[str, ...]) -> Any:
    """`LinearPreferenceLoss`, or its like with the fields `stats` after its own."""
    if not stats:
        return LinearPreferenceLoss
    fields = ("loss", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps", *stats)
    return run_time_tuple("LinearPreferenceLoss", fields, margins=True)


def linear_group_type(stats: tuple[str, ...]) -> Any:
    """`LinearGroupLoss`, or its like with the fields `stats` after its own."""
    if not stats:
        return LinearGroupLoss
    return run_time_tuple("LinearGroupLoss", ("loss", "logps", *stats))

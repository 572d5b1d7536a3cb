"""The named tuples that functions return."""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """The result of a preference loss.

    Attributes:
        loss: a scalar, or (B,) with `reduction="none"`. The only differentiable field.
        chosen_rewards: (B,), β(log π(chosen) − log π_ref(chosen)), detached.
        rejected_rewards: (B,), β(log π(rejected) − log π_ref(rejected)), detached.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """Return the chosen minus the rejected rewards, (B,)."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracies(self) -> Tensor:
        """Return 1 where the chosen completion has the higher reward, else 0, (B,) float."""
        return (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype)


class KTOResult(NamedTuple):
    """The result of `kto_loss`.

    Attributes:
        loss: a scalar, or (B,) with `reduction="none"`. The only differentiable field.
        rewards: (B,), β(log π(y) − log π_ref(y)), detached.
    """

    loss: Tensor
    rewards: Tensor


class LinearPreferenceLoss(NamedTuple):
    """The result of `linear_dpo_loss`. The statistics that a call asks for follow these fields.

    Attributes:
        loss: a scalar, or (B,) with `reduction="none"`. The only differentiable field.
        chosen_rewards: (B,), as in `PreferenceLoss`.
        rejected_rewards: (B,), as in `PreferenceLoss`.
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
    """The result of `linear_preference_loss`. The statistics that a call asks for follow these fields.

    Attributes:
        loss: a scalar, or (G,) with `reduction="none"`. The only differentiable field.
        logps: (G, K), the log-prob of member k of group g, detached.
    """

    loss: Tensor
    logps: Tensor


class PPOPolicyResult(NamedTuple):
    """The result of `ppo_policy_loss`. Every field is a scalar, reduced as the loss is.

    Attributes:
        loss: the only differentiable field.
        approx_kl: the mean of ½(log π − log π_old)², an estimate of KL(π_old‖π) in nats.
        clip_fraction: the share of tokens where the clipped branch is the larger, −A·clip(ρ, 1 − low, 1 + high) > −Aρ.
            It does not count the tokens that `dual_clip` bounds: where A < 0, only a ratio below 1 − low is clipped.
    """

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


class PPOValueResult(NamedTuple):
    """The result of `ppo_value_loss`. Every field is a scalar, reduced as the loss is.

    Attributes:
        loss: the only differentiable field.
        clip_fraction: the share of tokens where the clipped branch is the larger.
    """

    loss: Tensor
    clip_fraction: Tensor


class PPOResult(NamedTuple):
    """The result of `ppo_loss`. Every field is a scalar, reduced as the loss is.

    Attributes:
        loss: policy_loss + c·value_loss, the only differentiable field.
        policy_loss: the loss of `ppo_policy_loss`, detached.
        value_loss: the loss of `ppo_value_loss`, detached.
        approx_kl: as in `PPOPolicyResult`.
        clip_fraction: as in `PPOPolicyResult`.
    """

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


class _Margins:
    """The properties of `PreferenceLoss`, for named tuples that are made at run time."""

    __slots__ = ()
    margins = PreferenceLoss.margins
    accuracies = PreferenceLoss.accuracies


def _make(name: str, fields: tuple[str, ...], margins: bool) -> Any:
    if not margins:
        return namedtuple(name, fields)
    # This calls `type`, because Dynamo can trace it and not a class statement.
    return type(name, (_Margins, namedtuple("Fields", fields)), {"__slots__": ()})


@cache
def _made(name: str, fields: tuple[str, ...], margins: bool) -> Any:
    made = _make(name, fields, margins)
    # No module holds the class, so a pickled tuple stores how to make it.
    made.__reduce__ = lambda self: (_again, (name, fields, margins, tuple(self)))
    return made


def _again(name: str, fields: tuple[str, ...], margins: bool, values: tuple[Any, ...]) -> Any:
    return _made(name, fields, margins)._make(values)


def run_time_tuple(name: str, fields: tuple[str, ...], margins: bool = False) -> Any:
    """Return the named-tuple class with this name and these fields, the same one for equal arguments.

    With `margins`, the class has the properties `margins` and `accuracies`.
    """
    # Dynamo warns when it traces through a cache, and makes the class once per graph anyway.
    return (_make if torch.compiler.is_compiling() else _made)(name, fields, margins)


if TYPE_CHECKING:

    class Logprobs(tuple[Tensor, ...]):
        """The result of a log-prob function with `stats`: `logprobs`, then the statistics in the order of `stats`."""

        logprobs: Tensor
        lse: Tensor
        entropy: Tensor
        mean_logits: Tensor
        is_top1: Tensor
        log_sum_sq_probs: Tensor
        top2_margin: Tensor
        dropped_mass: Tensor

        def _asdict(self) -> dict[str, Tensor]: ...


def result_type(stats: tuple[str, ...]) -> Any:
    """Return the named tuple class with the field `logprobs` and then `stats`, in the order of the call."""
    return run_time_tuple("Logprobs", ("logprobs", *stats))


def linear_loss_type(stats: tuple[str, ...]) -> Any:
    """Return `LinearPreferenceLoss`, or a class like it with the fields `stats` after its own."""
    if not stats:
        return LinearPreferenceLoss
    return run_time_tuple("LinearPreferenceLoss", (*LinearPreferenceLoss._fields, *stats), margins=True)


def linear_group_type(stats: tuple[str, ...]) -> Any:
    """Return `LinearGroupLoss`, or a class like it with the fields `stats` after its own."""
    if not stats:
        return LinearGroupLoss
    return run_time_tuple("LinearGroupLoss", (*LinearGroupLoss._fields, *stats))

"""Modules of the losses of PPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._core.checks import check_finite, check_int
from fastpref.losses.rlhf import ppo_policy_loss, ppo_value_loss
from fastpref.nn.module import Loss, empty


class PPOPolicy(NamedTuple):
    """The result of `nn.PPOPolicyLoss`, in the order in which OpenRLHF unpacks it.

    Attributes:
        loss: a scalar, the only differentiable field.
        clip_fraction: a scalar, the share of this batch's tokens where the clipped branch is the larger.
        approx_kl: a scalar, the mean over this batch's tokens of ½(log π − log π_old)², in nats.
        rollout_kl: None. OpenRLHF returns the divergence of its correction here.
        filtered_fraction: None. OpenRLHF returns the share of tokens that its correction dropped here.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    rollout_kl: None = None
    filtered_fraction: None = None


def bool_mask(mask: Any, like: Any) -> Any:
    """Return OpenRLHF's mask as bool: None counts all elements of `like`, and any number but 0 is True.

    Anything but a tensor is returned as it is, so that the loss rejects it with an error that names it.
    """
    if mask is None and isinstance(like, Tensor):
        return torch.ones_like(like, dtype=torch.bool)
    return mask.bool() if isinstance(mask, Tensor) else mask


class _PPOLoss(Loss):
    """A clipped loss of tokens. Its mean may be over the tokens of a whole step, on all ranks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        x = empty(1)
        self.forward(x, x, x)

    def _denominator(
        self, dp_size: int, batch_num_tokens: Tensor | float | None, global_batch_size: Tensor | float | None
    ) -> Tensor | float | None:
        dp_size = check_int("dp_size", dp_size, least=1)
        counts = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
        for name, count in counts.items():
            if count is not None and not isinstance(count, Tensor):
                counts[name] = check_finite(name, count, least=0.0)
        total = counts["batch_num_tokens" if self.options["reduction"] == "token" else "global_batch_size"]
        return None if total is None else total / dp_size


class PPOPolicyLoss(_PPOLoss):
    """Compute `fastpref.ppo_policy_loss`, PPO's clipped surrogate (arXiv 1707.06347, eq. 7).

    It replaces OpenRLHF's `PolicyLoss` (`actor_loss_fn`): it is called in the same way and returns as many values in
    the same order, as of 0.11.2. It has the options for the clips and the reduction, and no others.

    Args:
        clip: how far from 1 the ratio may be: a number above 0 for both sides, or a pair (low, high) of numbers that
            are 0 or more and not both 0.
        dual_clip: None, or a number above 1, which bounds the ratio where an advantage is below 0 (arXiv 1912.09729).
        reduction: "token" for the mean over all tokens, "sequence" for the mean over sequences of their means.

    Raises:
        TypeError: an option is unknown, has a wrong type, or is a tensor.
        ValueError: an option is out of range.
    """

    def __init__(
        self, *, clip: float | Sequence[float] = 0.2, dual_clip: float | None = None, reduction: str = "token"
    ) -> None:
        super().__init__(clip=clip, dual_clip=dual_clip, reduction=reduction)

    def forward(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> PPOPolicy:
        """Return the loss of the tokens of a batch.

        Args:
            logps: (B, T), log π of the sampled tokens, nats, any floating dtype.
            old_logps: (B, T), log π_old of the same tokens, under the policy that sampled them. It gets no gradient.
            advantages: (B, T). It gets no gradient.
            action_mask: (B, T) bool or integers, not 0 where a token counts; None counts all.
            rollout_log_probs: not used, as in OpenRLHF without a correction by the log-probs of the rollout.
            dp_size: the number of ranks over which gradients are averaged.
            batch_num_tokens: None, or the number of tokens of all ranks, a number or (), which divides the sum over
                tokens.
            global_batch_size: None, or with reduction "sequence" the number of sequences of all ranks.

        Returns:
            (loss, clip_fraction, approx_kl, None, None), scalars.

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes or devices differ.
        """
        mask = bool_mask(action_mask, logps)
        denominator = self._denominator(dp_size, batch_num_tokens, global_batch_size)
        result = reported = ppo_policy_loss(logps, old_logps, advantages, mask, denominator=denominator, **self.options)
        # These are means over the tokens of this batch, whatever divides the loss: OpenRLHF weights its logs by their
        # number.
        if denominator is not None or self.options["reduction"] != "token":
            with torch.no_grad():
                options = {**self.options, "reduction": "token"}
                reported = ppo_policy_loss(logps, old_logps, advantages, mask, **options)
        return PPOPolicy(result.loss, reported.clip_fraction, reported.approx_kl)


class PPOValueLoss(_PPOLoss):
    """Compute `fastpref.ppo_value_loss`, PPO's clipped value loss (arXiv 1909.08593).

    It replaces OpenRLHF's `ValueLoss` (`critic_loss_fn`): it is called in the same way and returns the loss alone.

    Args:
        clip: how far a value may move from its old one, above 0, in the units of the rewards.
        reduction: as in `PPOPolicyLoss`.

    Raises:
        TypeError: an option is unknown, has a wrong type, or is a tensor.
        ValueError: an option is out of range.
    """

    def __init__(self, *, clip: float = 0.2, reduction: str = "token") -> None:
        super().__init__(clip=clip, reduction=reduction)

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of the tokens of a batch.

        Args:
            values: (B, T), the output of the value head, any floating dtype.
            old_values: (B, T), the values when the tokens were sampled. It gets no gradient.
            returns: (B, T), from `gae`. It gets no gradient.
            action_mask: (B, T), as in `PPOPolicyLoss`, like every argument after it.
            dp_size: the number of ranks over which gradients are averaged.
            batch_num_tokens: the number of tokens of all ranks.
            global_batch_size: the number of sequences of all ranks.

        Returns:
            The loss, a scalar.

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes or devices differ.
        """
        denominator = self._denominator(dp_size, batch_num_tokens, global_batch_size)
        mask = bool_mask(action_mask, values)
        return ppo_value_loss(values, old_values, returns, mask, denominator=denominator, **self.options).loss

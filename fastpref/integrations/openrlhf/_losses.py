"""OpenRLHF's losses and advantages, computed by fastpref's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpref import nn as losses
from fastpref._core.checks import describe
from fastpref._core.loss_checks import check_tokens
from fastpref._core.results import PreferenceLoss
from fastpref.losses.rlhf import gae
from fastpref.reference.losses.rlhf import bounded_log_ratio, counted, masked_mean


def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """Compute advantages by `fastpref.gae`, with OpenRLHF's meaning of a mask.

    In OpenRLHF, a token whose mask is 0 is a step with value and reward 0; `gae` would skip it. In OpenRLHF this is a
    method of the experience maker.

    Args:
        values: (B, T), any floating dtype.
        rewards: (B, T), in the units of `values`.
        action_mask: (B, T) bool or numbers, 0 where a token does not count. None: all tokens count.
        gamma: γ in [0, 1].
        lambd: λ in [0, 1].

    Returns:
        (advantages, returns), (B, T) each, float32 (float64 for float64), detached.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes or devices differ, or γ or λ is not in [0, 1].
    """
    if action_mask is not None:
        values, rewards = (x.masked_fill(action_mask == 0, 0.0) for x in (values, rewards))
    return gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), gamma=gamma, lam=lambd)


class DPOLoss(nn.Module):
    """Compute the DPO loss (arXiv 2305.18290), or with `ipo` the IPO loss (2310.12036), by `fastpref.nn.DPOLoss`.

    `label_smoothing` with `ipo`, which OpenRLHF ignores, raises `ValueError`.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.loss = losses.DPOLoss(beta=beta, label_smoothing=label_smoothing, loss_type="ipo" if ipo else "sigmoid")

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> PreferenceLoss:
        """Return (loss, chosen_rewards, rejected_rewards) of B pairs: a scalar, (B,) and (B,).

        The log-probs are (B,). The errors are those of `dpo_loss`.
        """
        return self.loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)


class PairWiseLoss(nn.Module):
    """Compute the reward model's pairwise loss (arXiv 2009.01325) by `fastpref.nn.PairwiseRewardLoss`."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = losses.PairwiseRewardLoss()

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """Return the mean loss of B pairs, a scalar. Rewards and margin are (B,).

        The errors are those of `pairwise_reward_loss`.
        """
        return self.loss(chosen_reward, reject_reward, margin)


class LogExpLoss(PairWiseLoss):
    """Compute the same loss as `PairWiseLoss` (arXiv 2204.05862), without a margin."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """Return what `PairWiseLoss` does. A margin, which OpenRLHF ignores, raises `ValueError`."""
        if margin is not None:
            raise ValueError(
                f"LogExpLoss has no margin; got margin={describe(margin)}. Use PairWiseLoss, or pass no margin"
            )
        return super().forward(chosen_reward, reject_reward)


class PolicyLoss(nn.Module):
    """Compute OpenRLHF's clipped policy loss (arXiv 1707.06347, dual clip 1912.09729) by `fastpref.nn.PPOPolicyLoss`.

    GSPO and corrections of the rollout's log-probs are not supported, and raise `NotImplementedError`.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Any = (0.5, 5.0),
    ) -> None:
        super().__init__()
        if (policy_loss_type, is_correction_level) != ("ppo", "off"):
            raise NotImplementedError(
                "PolicyLoss supports policy_loss_type='ppo' with is_correction_level='off' only; got "
                f"{policy_loss_type=}, {is_correction_level=}. Use OpenRLHF's own PolicyLoss for these"
            )
        self.loss = losses.PPOPolicyLoss(
            clip=(clip_eps_low, clip_eps_high),
            dual_clip=dual_clip,
            reduction="token" if token_level_loss else "sequence",
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Any, ...]:
        """Return (loss, clip_ratio, ppo_kl, None, None), scalars.

        The arguments and errors are those of `fastpref.nn.PPOPolicyLoss`. As in OpenRLHF, a log-ratio beyond ±20 counts
        as ±20 in the loss and has no gradient; clip_ratio is the share of tokens whose clipped branch is the larger,
        whatever the dual clip does; and ppo_kl is the mean of log π_old − log π.
        """
        mask = losses.bool_mask(action_mask, log_probs)
        check_tokens(mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
        log_ratio = bounded_log_ratio(log_probs, old_log_probs)
        totals = (dp_size, batch_num_tokens, global_batch_size)
        result = self.loss(log_ratio, torch.zeros_like(log_ratio), advantages, mask, rollout_log_probs, *totals)
        new, old = counted(mask, log_probs.detach(), old_log_probs.detach())
        return result.loss, result.clip_fraction, masked_mean(old - new, mask, "token", None), None, None


class ValueLoss(nn.Module):
    """Compute OpenRLHF's clipped value loss (arXiv 1909.08593) by `fastpref.nn.PPOValueLoss`."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        clip = 1e30 if clip_eps is None else clip_eps  # so large that no value is clipped
        self.loss = losses.PPOValueLoss(clip=clip, reduction="token" if token_level_loss else "sequence")

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """Return the loss, a scalar. The arguments and errors are those of `fastpref.nn.PPOValueLoss`."""
        return self.loss(values, old_values, returns, action_mask, dp_size, batch_num_tokens, global_batch_size)

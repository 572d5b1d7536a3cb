"""RLHF by PPO: shaped rewards, advantages, the clipped losses and the controller of the KL coefficient.

These definitions are also the code that runs, except for `gae`, which has kernels. Every tensor is (B, T), with one
column per token, and every mask is True where a token counts. What lies elsewhere, even a NaN, reaches no value and no
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.reference.losses.reduction import counted, masked_mean, widen
from fastpref.reference.results import PPOPolicyResult, PPOResult, PPOValueResult

ESTIMATORS = ("k1", "k2", "k3")
REDUCTIONS = ("token", "sequence")
# The largest change of an adaptive KL coefficient, as a share, over `horizon` samples.
MAX_CHANGE = 0.2
# The largest log-ratio of two policies, either way, in OpenRLHF's and verl's losses.
MAX_LOG_RATIO = 20.0


def bounded_log_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """Return log π − log π_old, clamped to ±20, in float32 at least. Beyond ±20, its gradient is zero."""
    logps, old_logps = widen(logps, old_logps.detach())
    return (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_shaped_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """Compute `fastpref.kl_shaped_rewards` in plain PyTorch. An unknown estimator is a `ValueError`."""
    scores, logps, ref_logps = widen(scores.detach(), logps.detach(), ref_logps.detach())
    d = (logps - ref_logps).masked_fill(~mask, 0.0)
    if estimator == "k1":
        penalty = d
    elif estimator == "k2":
        penalty = d**2 / 2
    elif estimator == "k3":
        penalty = torch.expm1(-d) + d
    else:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, ESTIMATORS))}; got {estimator!r}")
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    # At a coefficient of 0, the penalty is left out: it may be infinite, and 0·inf is NaN.
    return torch.where(last, scores[:, None], 0.0) - (kl_coef * penalty if kl_coef else 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Compute `fastpref.gae` in plain PyTorch."""
    rewards, values = widen(rewards.detach(), values.detach())
    advantages = torch.zeros_like(rewards)
    advantage = next_value = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(counts, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counts, values[:, t], next_value)
        advantages[:, t] = torch.where(counts, advantage, 0.0)
    return advantages, advantages + values.masked_fill(~mask, 0.0)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Compute `fastpref.masked_whiten` in plain PyTorch."""
    (x,) = counted(mask, x)
    count = mask.sum().clamp(min=1)
    mean = x.sum() / count
    centred = (x - mean).masked_fill(~mask, 0.0)
    whitened = centred / ((centred**2).sum() / count + 1e-8).sqrt()
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


def ppo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float | Sequence[float] = 0.2,
    dual_clip: float | None = None,
    reduction: str = "token",
    denominator: Tensor | float | None = None,
) -> PPOPolicyResult:
    """Compute `fastpref.ppo_policy_loss` in plain PyTorch. An unknown reduction is a `ValueError`."""
    low, high = clip if isinstance(clip, Sequence) else (clip, clip)
    logps, old_logps, advantages = counted(mask, logps, old_logps.detach(), advantages.detach())
    log_ratio = logps - old_logps
    # A ratio beyond the bounds has no part in the loss, but it may overflow, and its gradient 0·inf would be NaN.
    bounded = torch.where(advantages >= 0, log_ratio.clamp(max=1 + math.log1p(high)), log_ratio)
    if dual_clip is not None:
        bounded = torch.where(advantages < 0, log_ratio.clamp(max=1 + math.log(dual_clip)), bounded)
    ratio = bounded.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    # torch.maximum and torch.minimum halve a gradient at a tie, and the gradient that clamp adds there depends on the
    # version of torch. So this uses torch.where.
    is_clipped = clipped > unclipped
    losses = torch.where(is_clipped, clipped, unclipped)
    if dual_clip is not None:
        largest = -advantages * dual_clip
        losses = torch.where((advantages < 0) & (losses > largest), largest, losses)
    reported = (log_ratio.detach() ** 2 / 2, is_clipped.to(losses.dtype))
    return PPOPolicyResult(*(masked_mean(x, mask, reduction, denominator) for x in (losses, *reported)))


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    reduction: str = "token",
    denominator: Tensor | float | None = None,
) -> PPOValueResult:
    """Compute `fastpref.ppo_value_loss` in plain PyTorch. An unknown reduction is a `ValueError`."""
    values, old_values, returns = counted(mask, values, old_values.detach(), returns.detach())
    unclipped = (values - returns) ** 2
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    # torch.where, not torch.maximum, as in `ppo_policy_loss`. In this order, a NaN in `old_values` reaches the loss.
    losses = torch.where(clipped <= unclipped, unclipped, clipped) / 2
    outside = (clipped > unclipped).to(losses.dtype)
    return PPOValueResult(*(masked_mean(x, mask, reduction, denominator) for x in (losses, outside)))


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | Sequence[float] = 0.2,
    dual_clip: float | None = None,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    reduction: str = "token",
    denominator: Tensor | float | None = None,
) -> PPOResult:
    """Compute `fastpref.ppo_loss` in plain PyTorch. An unknown reduction is a `ValueError`."""
    mean = {"reduction": reduction, "denominator": denominator}
    policy = ppo_policy_loss(logps, old_logps, advantages, mask, clip=clip, dual_clip=dual_clip, **mean)
    value = ppo_value_loss(values, old_values, returns, mask, clip=value_clip, **mean)
    loss = policy.loss + value_coef * value.loss
    return PPOResult(loss, policy.loss.detach(), value.loss.detach(), policy.approx_kl, policy.clip_fraction)


def ptx_loss(
    token_logps: Tensor,
    mask: Tensor,
    *,
    gamma: float = 27.8,
    reduction: str = "token",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Compute `fastpref.ptx_loss` in plain PyTorch. An unknown reduction is a `ValueError`."""
    (token_logps,) = counted(mask, token_logps)
    return -gamma * masked_mean(token_logps, mask, reduction, denominator)


class AdaptiveKLController:
    """`fastpref.AdaptiveKLController`: c ← c·(1 + clip(KL/target − 1, ±0.2)·n/horizon)."""

    def __init__(self, init: float, target: float, horizon: float) -> None:
        self.value = init
        self.target = target
        self.horizon = horizon

    def update(self, kl: Tensor | float, n: int) -> None:
        """Update the coefficient from the mean KL of n samples."""
        error = min(max(float(kl) / self.target - 1, -MAX_CHANGE), MAX_CHANGE)
        self.value *= 1 + error * n / self.horizon

"""RLHF by PPO: shaped rewards, advantages, the clipped losses and the controller of the KL coefficient.

The definitions; all but `gae`, which has kernels, are also what runs. Every tensor is (B, T), a token a column, and
every mask True where a token counts: what lies elsewhere, a NaN too, reaches neither a value nor a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref._checks import (
    FLOATING,
    as_float,
    check_bool,
    check_choice,
    check_finite,
    check_positive,
    check_same_device,
    check_tensor,
    check_vector,
    describe,
    is_sequence,
    shape_error,
)
from fastpref.reference.losses.preference import widen

ESTIMATORS = ("k1", "k2", "k3")
REDUCTIONS = ("token", "sequence")
# The largest change of an adaptive KL coefficient, as a share, over `horizon` samples.
MAX_CHANGE = 0.2
# The largest bound of a clip: 1 plus a larger one is not a float32.
MAX_CLIP = 1e30
# The largest log-ratio of two policies, either way, in OpenRLHF's and verl's losses.
MAX_LOG_RATIO = 20.0


class PPOPolicyLoss(NamedTuple):
    """What `ppo_policy_loss` returns; every field a scalar, reduced as the loss is.

    Attributes:
        loss: the only differentiable field.
        approx_kl: the mean of ½(log π − log π_old)², an estimate of KL(π_old‖π) in nats.
        clip_fraction: the share of tokens where the clipped branch is the larger, −A·clip(ρ, 1 − low, 1 + high) > −Aρ.
            The tokens that `dual_clip` bounds are not among them: where A < 0, only a ratio below 1 − low is.
    """

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


class PPOValueLoss(NamedTuple):
    """What `ppo_value_loss` returns; every field a scalar, reduced as the loss is.

    Attributes:
        loss: the only differentiable field.
        clip_fraction: the share of tokens where the clipped branch is the larger.
    """

    loss: Tensor
    clip_fraction: Tensor


class PPOLoss(NamedTuple):
    """What `ppo_loss` returns; every field a scalar, reduced as the loss is.

    Attributes:
        loss: policy_loss + c·value_loss, the only differentiable field.
        policy_loss: as `ppo_policy_loss` gives it, detached.
        value_loss: as `ppo_value_loss` gives it, detached.
        approx_kl: the policy's, as in `PPOPolicyLoss`.
        clip_fraction: the policy's.
    """

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def check_tokens(mask: Tensor, **named: Tensor) -> None:
    """Raise unless the named tensors are floating point, (B, T) and alike, and the mask is bool and like them."""
    first_name, first = next(iter(named.items()))
    for name, value in named.items():
        check_tensor(name, value, FLOATING, "a floating-point tensor (B, T)")
    if first.dim() != 2:
        raise shape_error(first_name, first, "(B, T), a column a token", 2)
    check_tensor("mask", mask, (torch.bool,), "a bool tensor (B, T), True where a token counts")
    for name, value in (*named.items(), ("mask", mask)):
        if value.shape != first.shape:
            raise shape_error(name, value, f"(B, T) = {tuple(first.shape)}, like {first_name}", 2)
        check_same_device(name, value, first_name, first)


def check_mean(mask: Tensor, reduction: str, denominator: Tensor | float | None) -> None:
    """Check the arguments that every masked mean takes."""
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(denominator, Tensor):
        if denominator.dim() or denominator.is_complex():
            raise ValueError(f"denominator must be None, a number or a real tensor (); got {describe(denominator)}")
        check_same_device("denominator", denominator, "mask", mask)
    elif denominator is not None:
        check_finite("denominator", denominator, least=0.0)


def check_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[float, float]:
    """Check `gae`'s arguments and return γ and λ."""
    check_tokens(mask, rewards=rewards, values=values)
    return check_finite("gamma", gamma, least=0.0, most=1.0), check_finite("lam", lam, least=0.0, most=1.0)


def check_clip(clip: object) -> tuple[float, float]:
    """Return `clip`, a number above 0 or a pair (low, high), as a pair, or raise if it is neither."""
    bounds = clip if is_sequence(clip) and len(clip) == 2 else (clip, clip)
    try:
        low, high = [check_finite("clip", bound, least=0.0, most=MAX_CLIP) for bound in bounds]
        if low == high == 0:
            raise ValueError
    except (TypeError, ValueError) as error:
        raise type(error)(
            "clip must be a number above 0, or a pair (low, high) of numbers, 0 or more and not both 0, "
            f"up to {MAX_CLIP:g}; got {describe(clip)}"
        ) from None
    return low, high


def check_dual_clip(dual_clip: float | None) -> float | None:
    """Return `dual_clip` as a float, or None for None, and raise unless a number is above 1."""
    return None if dual_clip is None else check_finite("dual_clip", dual_clip, least=1.0, most=MAX_CLIP, exclusive=True)


def counted(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in their common dtype, float32 at the least, and 0 where a token does not count."""
    return tuple(tensor.masked_fill(~mask, 0.0) for tensor in widen(*tensors))


def bounded_log_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """Return log π − log π_old within ±20, in float32 at the least. Beyond, its gradient is zero."""
    logps, old_logps = widen(logps, old_logps.detach())
    return (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def masked_mean(x: Tensor, mask: Tensor, reduction: str, denominator: Tensor | float | None) -> Tensor:
    """The mean of x (B, T), which is 0 where a token does not count; a mean over nothing is 0."""
    if reduction == "token":
        total, count = x.sum(), mask.sum()
    else:
        lengths = mask.sum(1)
        total, count = (x.sum(1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
    if denominator is None:
        return total / count.clamp(min=1)
    if isinstance(denominator, Tensor):
        denominator = denominator.detach().to(x.dtype)
        return total / denominator.masked_fill(denominator == 0, 1.0)
    return total / float(denominator or 1)


def kl_shaped_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """Per-token rewards of RLHF: −kl_coef·k_t at every token, plus the sequence's score at its last one.

    With d = log π(a_t) − log π_ref(a_t), k_t is an estimate of KL(π‖π_ref): d (`k1`), d²/2 (`k2`), e^{−d} − 1 + d
    (`k3`, unbiased and never below 0). The first is that of arXiv 1909.08593 and 2009.01325.

    Args:
        scores: (B,), the reward model's, any floating dtype.
        logps: (B, T), log π of the sampled tokens, nats, any floating dtype; computed in float32 (float64 for float64).
        ref_logps: (B, T), the same under the reference.
        mask: (B, T) bool, True where a token counts.
        kl_coef: the price of a nat, 0 or more.
        estimator: "k1", "k2" or "k3".

    Returns:
        (B, T) float32 (float64 for float64), detached; 0 where a token does not count, and no score where none does.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(mask, logps=logps, ref_logps=ref_logps)
    check_vector("scores", scores, FLOATING, "a floating-point tensor (B,)", like=("logps", logps))
    check_choice("estimator", estimator, ESTIMATORS)
    kl_coef = check_finite("kl_coef", kl_coef, least=0.0)
    scores, logps, ref_logps = widen(scores.detach(), logps.detach(), ref_logps.detach())
    d = (logps - ref_logps).masked_fill(~mask, 0.0)
    if estimator == "k1":
        penalty = d
    elif estimator == "k2":
        penalty = d**2 / 2
    else:
        penalty = torch.expm1(-d) + d
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    # At a coefficient of 0, not 0 times a k3 that overflows.
    return torch.where(last, scores[:, None], 0.0) - (kl_coef * penalty if kl_coef else 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """`fastpref.gae` in plain PyTorch."""
    gamma, lam = check_gae(rewards, values, mask, gamma, lam)
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
    """x with variance 1, and mean 0 or its own, over what counts: (x − μ)/√(σ² + 1e-8), + μ without `shift_mean`.

    μ and σ² are of the whole tensor, σ² with the count as its divisor. How arXiv 1909.08593's code normalises
    advantages, and, keeping the mean, rewards.

    Args:
        x: any shape, any floating dtype; computed in float32 (float64 for float64).
        mask: bool, of x's shape, True where an element counts.
        shift_mean: make the mean 0; False keeps it.

    Returns:
        x's shape, float32 (float64 for float64), differentiable; 0 where an element does not count.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ.
    """
    check_tensor("x", x, FLOATING, "a floating-point tensor")
    check_tensor("mask", mask, (torch.bool,), "a bool tensor of x's shape, True where an element counts")
    if mask.shape != x.shape:
        raise shape_error("mask", mask, f"{tuple(x.shape)}, like x", x.dim())
    check_same_device("mask", mask, "x", x)
    check_bool("shift_mean", shift_mean)
    (x,) = counted(mask, x)
    count = mask.sum().clamp(min=1)
    mean = x.sum() / count
    centred = (x - mean).masked_fill(~mask, 0.0)
    whitened = centred / ((centred**2).sum() / count + 1e-8).sqrt()
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float | Sequence[float] = 0.2,
    dual_clip: float | None = None, reduction: str = "token", denominator: Tensor | float | None = None,
) -> PPOPolicyLoss:  # fmt: skip
    """Compute PPO's clipped surrogate, the masked mean of max(−Aρ, −A·clip(ρ, 1 − low, 1 + high)), ρ = π/π_old.

    It is equation 7 of arXiv 1707.06347, with a bound of its own on either side. With `dual_clip=c`, a token's loss
    where A < 0 is the smaller of that and −A·c (arXiv 1912.09729), so that a ratio above c no longer counts there. At a
    bound, the gradient is that of the unclipped −Aρ.

    Args:
        logps: (B, T), log π of the sampled tokens, nats, any floating dtype; computed in float32 (float64 for float64).
        old_logps: (B, T), the same under the policy that sampled them. Carries no gradient.
        advantages: (B, T), A, as `gae` gives them, whitened or not. Carries no gradient.
        mask: (B, T) bool, True where a token counts.
        clip: how far from 1 the ratio may be: a number above 0 for both sides, or a pair (low, high) of numbers that
            are 0 or more and not both 0. A `low` of 1 or more does not clip, because a ratio is never below 0.
        dual_clip: None, or c above 1, which bounds the ratio where A < 0; `high` has no effect there.
        reduction: "token" for the mean over all tokens, "sequence" for the mean over sequences of each one's own mean;
            a sequence without a token is in neither.
        denominator: None, or a number or tensor () to divide by instead of the count of tokens, or of sequences: the
            whole batch's, and the losses of its parts add up to its loss. Where gradients are averaged over ranks, that
            of all of them divided by their number. 0 divides by 1.

    Returns:
        PPOPolicyLoss(loss, approx_kl, clip_fraction), scalars; a mean over nothing is 0.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    check_mean(mask, reduction, denominator)
    low, high = check_clip(clip)
    dual_clip = check_dual_clip(dual_clip)
    logps, old_logps, advantages = counted(mask, logps, old_logps.detach(), advantages.detach())
    log_ratio = logps - old_logps
    # Beyond the bounds, where a ratio has no part in the loss, it may overflow, and 0·inf is a gradient of NaN.
    bounded = torch.where(advantages >= 0, log_ratio.clamp(max=1 + math.log1p(high)), log_ratio)
    if dual_clip is not None:
        bounded = torch.where(advantages < 0, log_ratio.clamp(max=1 + math.log(dual_clip)), bounded)
    ratio = bounded.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    # Not torch.maximum and torch.minimum: they halve a gradient at a tie, and what clamp adds there depends on torch.
    is_clipped = clipped > unclipped
    losses = torch.where(is_clipped, clipped, unclipped)
    if dual_clip is not None:
        largest = -advantages * dual_clip
        losses = torch.where((advantages < 0) & (losses > largest), largest, losses)
    reported = (log_ratio.detach() ** 2 / 2, is_clipped.to(losses.dtype))
    return PPOPolicyLoss(*(masked_mean(x, mask, reduction, denominator) for x in (losses, *reported)))


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2,
    reduction: str = "token", denominator: Tensor | float | None = None,
) -> PPOValueLoss:  # fmt: skip
    """PPO's clipped value loss: ½ · masked mean of max((v − R)², (clip(v, old ± clip) − R)²).

    As in the code of arXiv 1909.08593 and 2009.01325.

    Args:
        values: (B, T), v, the value head's, any floating dtype; computed in float32 (float64 for float64).
        old_values: (B, T), v when the tokens were sampled. Carries no gradient.
        returns: (B, T), R, as `gae` gives them. Carries no gradient.
        mask: (B, T) bool, True where a token counts.
        clip: how far a value may move from its old one, above 0, in the rewards' units.
        reduction: as in `ppo_policy_loss`.
        denominator: as in `ppo_policy_loss`.

    Returns:
        PPOValueLoss(loss, clip_fraction), scalars; a mean over nothing is 0.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(mask, values=values, old_values=old_values, returns=returns)
    check_mean(mask, reduction, denominator)
    clip = check_positive("clip", clip)
    values, old_values, returns = counted(mask, values, old_values.detach(), returns.detach())
    unclipped = (values - returns) ** 2
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    # As in `ppo_policy_loss`, not torch.maximum. In this order a NaN in `old_values` is not passed over.
    losses = torch.where(clipped <= unclipped, unclipped, clipped) / 2
    outside = (clipped > unclipped).to(losses.dtype)
    return PPOValueLoss(*(masked_mean(x, mask, reduction, denominator) for x in (losses, outside)))


def ppo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor, returns: Tensor,
    mask: Tensor, *, clip: float | Sequence[float] = 0.2, dual_clip: float | None = None, value_clip: float = 0.2,
    value_coef: float = 0.1, reduction: str = "token", denominator: Tensor | float | None = None,
) -> PPOLoss:  # fmt: skip
    """Policy and value loss of a shared trunk: `ppo_policy_loss` + c·`ppo_value_loss` (arXiv 1909.08593).

    With separate models (arXiv 2009.01325, 2203.02155) use the two parts alone.

    Args:
        logps: (B, T), log π of the sampled tokens, nats, any floating dtype; computed in float32 (float64 for float64).
        old_logps: (B, T), the same under the policy that sampled them. Carries no gradient.
        advantages: (B, T), as `gae` gives them, whitened or not. Carries no gradient.
        values: (B, T), the value head's.
        old_values: (B, T), the values when the tokens were sampled. Carries no gradient.
        returns: (B, T), as `gae` gives them. Carries no gradient.
        mask: (B, T) bool, True where a token counts.
        clip: how far from 1 the ratio of the policies may be, a number or a pair, as in `ppo_policy_loss`.
        dual_clip: None, or what bounds the ratio where an advantage is below 0, as in `ppo_policy_loss`.
        value_clip: how far a value may move from its old one, above 0, in the rewards' units.
        value_coef: c, 0 or more.
        reduction: as in `ppo_policy_loss`.
        denominator: as in `ppo_policy_loss`.

    Returns:
        PPOLoss(loss, policy_loss, value_loss, approx_kl, clip_fraction), scalars; a mean over nothing is 0.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(
        mask, logps=logps, old_logps=old_logps, advantages=advantages, values=values, old_values=old_values,
        returns=returns,
    )  # fmt: skip
    check_positive("value_clip", value_clip)
    value_coef = check_finite("value_coef", value_coef, least=0.0)
    mean = {"reduction": reduction, "denominator": denominator}
    policy = ppo_policy_loss(logps, old_logps, advantages, mask, clip=clip, dual_clip=dual_clip, **mean)
    value = ppo_value_loss(values, old_values, returns, mask, clip=value_clip, **mean)
    loss = policy.loss + value_coef * value.loss
    return PPOLoss(loss, policy.loss.detach(), value.loss.detach(), policy.approx_kl, policy.clip_fraction)


def ptx_loss(
    token_logps: Tensor, mask: Tensor, *, gamma: float = 27.8, reduction: str = "token",
    denominator: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """Pretraining's part of PPO-ptx, added to PPO's loss: −γ · masked mean of log π(x_t) (arXiv 2203.02155, eq. 2).

    Args:
        token_logps: (B, T), log π of pretraining tokens, nats, as `token_logprobs` or `linear_token_logprobs` gives
            them; any floating dtype, computed in float32 (float64 for float64).
        mask: (B, T) bool, True where a token counts.
        gamma: γ, 0 or more; the default is the paper's.
        reduction: as in `ppo_policy_loss`.
        denominator: as in `ppo_policy_loss`.

    Returns:
        The loss, a scalar; a mean over nothing is 0.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(mask, token_logps=token_logps)
    check_mean(mask, reduction, denominator)
    gamma = check_finite("gamma", gamma, least=0.0)
    (token_logps,) = counted(mask, token_logps)
    return -gamma * masked_mean(token_logps, mask, reduction, denominator)


class AdaptiveKLController:
    """A KL coefficient that steers the KL to a target: c ← c·(1 + clip(KL/target − 1, ±0.2)·n/horizon).

    From arXiv 1909.08593, section 2.2. `value` is all of its state; set it to resume a run.

    Args:
        init: the first coefficient, above 0.
        target: the KL to steer to, above 0, in the units of the KL that `update` is given: nats a sequence, or a token.
        horizon: the samples over which the coefficient changes by a fifth at the most, above 0.

    Attributes:
        value: c, for `kl_shaped_rewards`' `kl_coef`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is not finite, or not above 0.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        self.value = check_positive("init", init)
        self.target = check_positive("target", target)
        self.horizon = check_positive("horizon", horizon)

    def update(self, kl: Tensor | float, n: int) -> None:
        """Move the coefficient.

        Args:
            kl: the mean KL of the last samples; a tensor of one element is read, which waits for its device.
            n: how many samples they were.

        Raises:
            TypeError: `kl` or n is not a number.
            ValueError: `kl` is NaN or a tensor of several elements, or n is below 0 or not finite.
        """
        if isinstance(kl, Tensor):
            if kl.numel() != 1 or kl.is_complex():
                raise ValueError(f"kl must be a number or a real tensor of one element; got {describe(kl)}")
            kl = float(kl)
        mean = as_float(kl)
        if mean is None:
            raise TypeError(f"kl must be a number or a real tensor of one element; got {describe(kl)}")
        if math.isnan(mean):
            raise ValueError(f"kl must be a number, not NaN; got {describe(kl)}")
        samples = check_finite("n", n, least=0.0)
        error = min(max(mean / self.target - 1, -MAX_CHANGE), MAX_CHANGE)
        self.value *= 1 + error * samples / self.horizon

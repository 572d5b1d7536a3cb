"""RLHF by PPO: shaped rewards, advantages, the clipped losses and the controller of the KL coefficient.

Advantages have kernels of their own. Everything else runs as its formula in `fastpref.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref._core.checks import (
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
    shape_error,
)
from fastpref._core.loss_checks import check_clip, check_dual_clip, check_gae, check_mean, check_tokens
from fastpref.reference.losses import rlhf as formula
from fastpref.reference.results import PPOPolicyResult, PPOResult, PPOValueResult
from fastpref_kernels import ops

assert ops  # importing it registers the operators

__all__ = [
    "AdaptiveKLController",
    "PPOPolicyResult",
    "PPOResult",
    "PPOValueResult",
    "gae",
    "kl_shaped_rewards",
    "masked_whiten",
    "ppo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ptx_loss",
]

# Former names of the results. Modules of fastpref.nn have two of these names too.
PPOPolicyLoss = PPOPolicyResult
PPOValueLoss = PPOValueResult
PPOLoss = PPOResult


def kl_shaped_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """Return the rewards of tokens for RLHF: −kl_coef·k_t, plus the sequence's score at its last token.

    With d = log π(a_t) − log π_ref(a_t), k_t is an estimate of KL(π‖π_ref): d (`k1`, as in arXiv 1909.08593 and
    2009.01325), d²/2 (`k2`), or e^{−d} − 1 + d (`k3`, unbiased and never below 0).

    Args:
        scores: (B,), the reward model's scores of the sequences, any floating dtype.
        logps: (B, T), log π of the sampled tokens, nats, any floating dtype; computed in float32 (float64 for float64).
        ref_logps: (B, T), log π_ref of the sampled tokens.
        mask: (B, T) bool, True where a token counts.
        kl_coef: the reward that one nat of k_t costs, 0 or more.
        estimator: "k1", "k2" or "k3".

    Returns:
        (B, T) float32 (float64 for float64), detached, and 0 where a token does not count. A sequence in which no token
        counts has no score.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(mask, logps=logps, ref_logps=ref_logps)
    check_vector("scores", scores, FLOATING, "a floating-point tensor (B,)", like=("logps", logps))
    check_choice("estimator", estimator, formula.ESTIMATORS)
    kl_coef = check_finite("kl_coef", kl_coef, least=0.0)
    return formula.kl_shaped_rewards(scores, logps, ref_logps, mask, kl_coef=kl_coef, estimator=estimator)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and returns (arXiv 1506.02438): A_t = δ_t + γλ·A_{t+1}.

    Here δ_t = r_t + γ·V_{t+1} − V_t, V and A beyond the last token are 0, and t + 1 is the next token that counts. A
    GPU computes it in one launch. A CPU multiplies by blocks of powers of γλ, without a loop over time.

    Args:
        rewards: (B, T), r, any floating dtype; computed in float32 (float64 for float64).
        values: (B, T), V, in the units of the rewards.
        mask: (B, T) bool, True where a token counts.
        gamma: γ in [0, 1], the discount of one token.
        lam: λ in [0, 1]: 0 trusts the values, 1 the rewards.

    Returns:
        (advantages, returns), (B, T) each, float32 (float64 for float64). returns = advantages + values, and both are 0
        where a token does not count. Both are detached, because PPO takes them as constants. A NaN or infinity at a
        token that counts affects its own sequence alone.

    Raises:
        TypeError: a tensor has a wrong dtype, or γ or λ is not a number.
        ValueError: shapes or devices differ, or γ or λ is not in [0, 1].
    """
    gamma, lam = check_gae(rewards, values, mask, gamma, lam)
    return torch.ops.fastpref.gae(rewards.detach(), values.detach(), mask, gamma, lam)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Return x with variance 1 and mean 0 over the elements that count, (x − μ)/√(σ² + 1e-8).

    μ and σ² are those of the whole tensor, and σ² divides by the count. Without `shift_mean`, μ is added again. The
    code of arXiv 1909.08593 normalises advantages in this way, and rewards without `shift_mean`.

    Args:
        x: any shape, any floating dtype; computed in float32 (float64 for float64).
        mask: bool, of x's shape, True where an element counts.
        shift_mean: whether the mean becomes 0; False keeps it.

    Returns:
        A tensor of x's shape, float32 (float64 for float64), differentiable, and 0 where an element does not count.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ.
    """
    check_tensor("x", x, FLOATING, "a floating-point tensor")
    check_tensor("mask", mask, (torch.bool,), "a bool tensor of x's shape, True where an element counts")
    if mask.shape != x.shape:
        raise shape_error("mask", mask, f"{tuple(x.shape)}, like x", x.dim())
    check_same_device("mask", mask, "x", x)
    check_bool("shift_mean", shift_mean)
    return formula.masked_whiten(x, mask, shift_mean=shift_mean)


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
    """Return PPO's clipped surrogate, the masked mean of max(−Aρ, −A·clip(ρ, 1 − low, 1 + high)), ρ = π/π_old.

    It is equation 7 of arXiv 1707.06347, with a separate bound on either side. With `dual_clip=c`, a token's loss
    where A < 0 is the smaller of that and −A·c (arXiv 1912.09729), so that a ratio above c no longer counts there. At a
    bound, the gradient is that of the unclipped −Aρ.

    Args:
        logps: (B, T), log π of the sampled tokens, nats, any floating dtype; computed in float32 (float64 for float64).
        old_logps: (B, T), log π_old of the same tokens, under the policy that sampled them. It gets no gradient.
        advantages: (B, T), A, from `gae`, whitened or not. It gets no gradient.
        mask: (B, T) bool, True where a token counts.
        clip: how far from 1 the ratio may be: a number above 0 for both sides, or a pair (low, high) of numbers that
            are 0 or more and not both 0. A `low` of 1 or more does not clip, because a ratio is never below 0.
        dual_clip: None, or c above 1, which bounds the ratio where A < 0; `high` has no effect there.
        reduction: "token" for the mean over all tokens, "sequence" for the mean over sequences of each one's own mean;
            a sequence without a token is in neither.
        denominator: None, or a number or tensor () to divide by instead of the count of tokens, or of sequences. With
            the count of a whole batch, the losses of its parts add up to its loss. Where gradients are averaged over
            ranks, pass the count of all ranks divided by the number of ranks. 0 divides by 1.

    Returns:
        PPOPolicyResult(loss, approx_kl, clip_fraction), scalars; a mean over nothing is 0.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    check_mean(mask, reduction, denominator)
    return formula.ppo_policy_loss(
        logps,
        old_logps,
        advantages,
        mask,
        clip=check_clip(clip),
        dual_clip=check_dual_clip(dual_clip),
        reduction=reduction,
        denominator=denominator,
    )


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
    """Return PPO's clipped value loss, ½ · masked mean of max((v − R)², (clip(v, old ± clip) − R)²).

    The code of arXiv 1909.08593 and 2009.01325 computes the loss in this way.

    Args:
        values: (B, T), v, the output of the value head, any floating dtype; computed in float32 (float64 for float64).
        old_values: (B, T), v when the tokens were sampled. It gets no gradient.
        returns: (B, T), R, from `gae`. It gets no gradient.
        mask: (B, T) bool, True where a token counts.
        clip: how far a value may move from its old one, above 0, in the units of the rewards.
        reduction: as in `ppo_policy_loss`.
        denominator: as in `ppo_policy_loss`.

    Returns:
        PPOValueResult(loss, clip_fraction), scalars; a mean over nothing is 0.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(mask, values=values, old_values=old_values, returns=returns)
    check_mean(mask, reduction, denominator)
    clip = check_positive("clip", clip)
    return formula.ppo_value_loss(
        values, old_values, returns, mask, clip=clip, reduction=reduction, denominator=denominator
    )


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
    """Return the policy and value loss of a shared trunk, `ppo_policy_loss` + c·`ppo_value_loss` (arXiv 1909.08593).

    With separate models (arXiv 2009.01325, 2203.02155), use the two parts alone.

    Args:
        logps: (B, T), log π of the sampled tokens, nats, any floating dtype; computed in float32 (float64 for float64).
        old_logps: (B, T), log π_old of the same tokens, under the policy that sampled them. It gets no gradient.
        advantages: (B, T), from `gae`, whitened or not. It gets no gradient.
        values: (B, T), the output of the value head.
        old_values: (B, T), the values when the tokens were sampled. It gets no gradient.
        returns: (B, T), from `gae`. It gets no gradient.
        mask: (B, T) bool, True where a token counts.
        clip: how far from 1 the ratio of the policies may be, a number or a pair, as in `ppo_policy_loss`.
        dual_clip: None, or the bound of the ratio where an advantage is below 0, as in `ppo_policy_loss`.
        value_clip: how far a value may move from its old one, above 0, in the units of the rewards.
        value_coef: c, 0 or more.
        reduction: as in `ppo_policy_loss`.
        denominator: as in `ppo_policy_loss`.

    Returns:
        PPOResult(loss, policy_loss, value_loss, approx_kl, clip_fraction), scalars; a mean over nothing is 0.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(
        mask,
        logps=logps,
        old_logps=old_logps,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
    )
    check_mean(mask, reduction, denominator)
    return formula.ppo_loss(
        logps,
        old_logps,
        advantages,
        values,
        old_values,
        returns,
        mask,
        clip=check_clip(clip),
        dual_clip=check_dual_clip(dual_clip),
        value_clip=check_positive("value_clip", value_clip),
        value_coef=check_finite("value_coef", value_coef, least=0.0),
        reduction=reduction,
        denominator=denominator,
    )


def ptx_loss(
    token_logps: Tensor,
    mask: Tensor,
    *,
    gamma: float = 27.8,
    reduction: str = "token",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Return the pretraining term of PPO-ptx, −γ · masked mean of log π(x_t) (arXiv 2203.02155, eq. 2).

    Add it to the loss of PPO.

    Args:
        token_logps: (B, T), log π of pretraining tokens, nats, from `token_logprobs` or `linear_token_logprobs`; any
            floating dtype, computed in float32 (float64 for float64).
        mask: (B, T) bool, True where a token counts.
        gamma: γ, 0 or more; the default is the paper's.
        reduction: as in `ppo_policy_loss`.
        denominator: as in `ppo_policy_loss`.

    Returns:
        The loss, a scalar; a mean over nothing is 0.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    check_tokens(mask, token_logps=token_logps)
    check_mean(mask, reduction, denominator)
    gamma = check_finite("gamma", gamma, least=0.0)
    return formula.ptx_loss(token_logps, mask, gamma=gamma, reduction=reduction, denominator=denominator)


class AdaptiveKLController(formula.AdaptiveKLController):
    """Adapt the KL coefficient to steer the KL to a target: c ← c·(1 + clip(KL/target − 1, ±0.2)·n/horizon).

    This is the controller of arXiv 1909.08593, section 2.2. `value` is its only state; set it to resume a run.

    Args:
        init: the first coefficient, above 0.
        target: the KL to steer to, above 0, in the unit of the KL that `update` is given: nats per sequence, or per
            token.
        horizon: the number of samples, above 0, over which the coefficient changes by at most a fifth.

    Attributes:
        value: c, for the `kl_coef` of `kl_shaped_rewards`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is not finite, or not above 0.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        super().__init__(
            check_positive("init", init), check_positive("target", target), check_positive("horizon", horizon)
        )

    def update(self, kl: Tensor | float, n: int) -> None:
        """Update the coefficient.

        Args:
            kl: the mean KL of the last samples, a number or a tensor of one element. Reading it waits for its device.
            n: the number of those samples.

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
        check_finite("n", n, least=0.0)
        super().update(mean, n)

"""verl's advantages and losses, computed by fastpref's."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastpref._core.checks import check_choice, check_finite
from fastpref._core.loss_checks import check_tokens
from fastpref.losses.rlhf import gae, masked_whiten, ppo_policy_loss, ppo_value_loss
from fastpref.reference.losses.rlhf import bounded_log_ratio, counted, masked_mean

_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Compute (advantages, returns) by `gae` (arXiv 1506.02438), and whiten the advantages by the unbiased variance.

    Tensors are (B, T); tokens whose response_mask is 0 are skipped. The results are detached, and 0 at skipped tokens,
    where verl leaves other values. The advantage of a single token is 0, where verl raises. The errors are those of
    `gae`.
    """
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam))
    # In their own dtype: a quotient of integers has the default dtype, which a process may set to bfloat16.
    count = mask.sum().clamp(min=1).to(advantages.dtype)
    return masked_whiten(advantages, mask) * ((count - 1) / count).sqrt(), returns


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, ...]:
    """Compute `ppo_policy_loss` with a dual clip, and return (loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower), scalars.

    Tensors are (B, T); tokens whose response_mask is 0 do not count. pg_clipfrac is the share of tokens whose clipped
    branch is the larger, ppo_kl the mean of log π_old − log π, and pg_clipfrac_lower the share of tokens with a
    negative advantage and a ratio above clip_ratio_c. The errors are those of `ppo_policy_loss`.
    """
    batch = _Tokens(old_log_prob, log_prob, advantages, response_mask.bool())
    clip = _clip(cliprange, cliprange_low, cliprange_high)
    return _policy_loss(batch, clip, clip_ratio_c, _mean(batch.mask, loss_agg_mode))


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute `compute_policy_loss` with options from `config`, and return the loss and a dict of metrics.

    This is the signature of verl's registry. rollout_is_weights (B, T), 0 or more, multiply the losses of tokens. The
    errors are those of `compute_policy_loss`.
    """
    batch = _Tokens(old_log_prob, log_prob, advantages, response_mask.bool(), rollout_is_weights)
    clip = _clip(config.clip_ratio, config.clip_ratio_low, config.clip_ratio_high)
    mean = _mean(batch.mask, loss_agg_mode, **config.global_batch_info)
    loss, *means = _policy_loss(batch, clip, config.get("clip_ratio_c", 3.0), mean)
    names = "pg_clipfrac", "ppo_kl", "pg_clipfrac_lower"
    return loss, {f"actor/{name}": value.item() for name, value in zip(names, means, strict=True)}


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `ppo_value_loss` (arXiv 1909.08593), and return (loss, share of clipped tokens), scalars.

    Tensors are (B, T). The errors are those of `ppo_value_loss`.
    """
    mask = response_mask.bool()
    mean = _mean(mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    loss = ppo_value_loss(vpreds, values, returns, mask, clip=cliprange_value, **mean).loss
    return loss, ppo_value_loss(vpreds.detach(), values, returns, mask, clip=cliprange_value).clip_fraction


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tensors of a policy loss, (B, T) each."""

    old: Tensor
    logps: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor | None = None


def _clip(clip: Any, low: Any, high: Any) -> tuple[Any, Any]:
    return clip if low is None else low, clip if high is None else high


def _mean(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> dict[str, Any]:
    """Return verl's aggregation as our keywords `reduction` and `denominator`."""
    check_choice("loss_agg_mode", loss_agg_mode, _MODES)
    by_tokens, total = loss_agg_mode == "token-mean", 1
    if loss_agg_mode != "token-sum":
        total = batch_num_tokens if by_tokens else global_batch_size
        if total is None and dp_size > 1:
            needed = "batch_num_tokens" if by_tokens else "global_batch_size"
            raise ValueError(
                f"{needed} is needed with loss_agg_mode={loss_agg_mode!r} and {dp_size=}; got None. Pass the number of "
                f"{'tokens' if by_tokens else 'sequences'} in the global batch"
            )
    if loss_agg_mode.startswith("seq-mean-token-sum"):
        total = mask.any(1).sum() if total is None else total
        if loss_agg_mode.endswith("norm"):
            total = total * (mask.shape[1] if loss_scale_factor is None else loss_scale_factor)
    reduction = "sequence" if loss_agg_mode == "seq-mean-token-mean" else "token"
    return {"reduction": reduction, "denominator": None if total is None else total / dp_size}


def _policy_loss(batch: _Tokens, clip: tuple[Any, Any], dual_clip: float, mean: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the loss, the share of clipped tokens, the mean of log π_old − log π, and the share at the dual clip.

    As in verl, a log-ratio beyond ±20 counts as ±20 and has no gradient.
    """
    mask, advantages = batch.mask, batch.advantages
    check_tokens(mask, log_prob=batch.logps, old_log_prob=batch.old, advantages=advantages)
    dual_clip = check_finite("clip_ratio_c", dual_clip, least=1.0, exclusive=True)
    options: dict[str, Any] = {"clip": clip, "dual_clip": dual_clip}
    log_ratio = bounded_log_ratio(batch.logps, batch.old)
    old = torch.zeros_like(log_ratio)
    weighted = advantages if batch.weights is None else advantages * batch.weights
    loss = ppo_policy_loss(log_ratio, old, weighted, mask, **options, **mean).loss
    with torch.no_grad():
        reported = ppo_policy_loss(log_ratio, old, advantages, mask, **options)
        at_dual_clip = ((advantages < 0) & (log_ratio.exp() > dual_clip)).float()
        means = (masked_mean(x, mask, "token", None) for x in counted(mask, -log_ratio, at_dual_clip))
        return loss, reported.clip_fraction, *means

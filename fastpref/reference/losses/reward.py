"""Reward-model losses on scalar rewards: the definitions, which are also the code that runs on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.reference.losses.reduction import reduce, widen

_NONE_IGNORED = torch.iinfo(torch.int64).min  # cross_entropy would ignore -100


def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastpref.pairwise_reward_loss` in plain PyTorch. An unknown reduction is a `ValueError`."""
    chosen, rejected = widen(chosen, rejected)
    u = chosen - rejected
    if margin is not None:
        u = u - (margin.detach().to(u.dtype) if isinstance(margin, Tensor) else margin)
    losses = -F.logsigmoid(u)
    if center_weight:
        losses = losses + center_weight * (chosen + rejected) ** 2
    return reduce(losses, reduction)


def best_of_k_loss(rewards: Tensor, best: Tensor, *, reduction: str = "mean") -> Tensor:
    """Compute `fastpref.best_of_k_loss` in plain PyTorch.

    Raises:
        ValueError: an unknown reduction.
        IndexError: `best` is outside [0, K); on a CPU, outside of `torch.compile`.
    """
    (rewards,) = widen(rewards)
    if reduction == "mean" and not rewards.shape[0]:
        reduction = "sum"  # a mean over nothing is 0
    try:
        return F.cross_entropy(rewards, best.long(), reduction=reduction, ignore_index=_NONE_IGNORED)
    except IndexError:
        row = int(((best < 0) | (best >= rewards.shape[1])).nonzero()[0])
        raise IndexError(f"best[{row}] is {int(best[row])}, outside [0, {rewards.shape[1]})") from None


def ranking_loss(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Compute `fastpref.ranking_loss` in plain PyTorch. An unknown reduction is a `ValueError`."""
    (rewards,) = widen(rewards)
    better = ranks[:, :, None] < ranks[:, None, :]
    if mask is not None:
        # Masked rewards become zeros, so that an inf or NaN at one reaches no gradient; masking the sum would not
        # suffice.
        rewards = rewards.masked_fill(~mask, 0.0)
        better = better & mask[:, :, None] & mask[:, None, :]
    # Answers that form no pair are masked before the loss, because a difference of two infinities would reach a
    # gradient.
    differences = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~better, 0.0)
    losses = -F.logsigmoid(differences).masked_fill(~better, 0.0).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)
    return reduce(losses, reduction)


def plackett_luce_loss(
    rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Compute `fastpref.plackett_luce_loss` in plain PyTorch. An unknown reduction is a `ValueError`.

    With ties among answers that count, each tied answer is chosen from among candidates that include the others.
    """
    (rewards,) = widen(rewards)
    counted = torch.ones_like(ranks, dtype=torch.bool) if mask is None else mask
    # Zeros keep an inf or NaN at a masked answer out of every gradient. Subtracting the top keeps the digits of rewards
    # that share a large offset.
    rewards = rewards.masked_fill(~counted, 0.0)
    top = rewards.detach().masked_fill(~counted, -torch.inf).amax(-1, keepdim=True)
    rewards = rewards - top.masked_fill(top == -torch.inf, 0.0)
    # Answer i is chosen from among those that are not ranked above it, itself included.
    among = counted[:, :, None] & counted[:, None, :] & (ranks[:, None, :] >= ranks[:, :, None])
    choices = rewards[:, None, :].masked_fill(~(among | ~counted[:, :, None]), -torch.inf)
    losses = (choices.logsumexp(-1) - rewards).masked_fill(~counted, 0.0).sum(-1)
    return reduce(losses, reduction)


def ranks_from_scores(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute `fastpref.ranks_from_scores` in plain PyTorch."""
    lacking = scores.isnan() if scores.is_floating_point() else torch.zeros_like(scores, dtype=torch.bool)
    counted = torch.ones_like(lacking) if mask is None else mask
    # A higher score, or any number where this one is NaN.
    higher = (scores[:, None, :] > scores[:, :, None]) | (lacking[:, :, None] & ~lacking[:, None, :])
    ranks = (higher & counted[:, None, :]).sum(-1)
    return ranks.masked_fill(~counted, scores.shape[1])

"""Reward-model losses on scalar rewards: the definitions, which are also what runs on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref._checks import (
    FLOATING,
    INTEGER,
    REDUCTIONS,
    check_choice,
    check_finite,
    check_same_device,
    check_tensor,
    check_vector,
    describe,
    shape_error,
)
from fastpref.reference.losses.preference import check_margin, check_vectors, reduce, widen

MAX_K = 64
_NONE_IGNORED = torch.iinfo(torch.int64).min  # cross_entropy would ignore -100


def check_rewards(rewards: Tensor, reduction: str) -> None:
    """Raise unless `rewards` is floating point and (B, K)."""
    check_tensor("rewards", rewards, FLOATING, "a floating-point tensor (B, K)")
    check_choice("reduction", reduction, REDUCTIONS)
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise shape_error("rewards", rewards, "(B, K), K answers a prompt", 2)


def check_like_rewards(name: str, value: Tensor, rewards: Tensor, dtypes: tuple[torch.dtype, ...], wanted: str) -> None:
    """Raise unless `value` has one of `dtypes`, and rewards' shape and device."""
    check_tensor(name, value, dtypes, wanted)
    if value.shape != rewards.shape:
        raise shape_error(name, value, f"of rewards' shape, {tuple(rewards.shape)}", 2)
    check_same_device(name, value, "rewards", rewards)


def check_best(rewards: Tensor, best: Tensor, reduction: str) -> None:
    """Check `best_of_k_loss`'s arguments."""
    check_rewards(rewards, reduction)
    check_vector("best", best, INTEGER, "an int64 or int32 tensor (B,)", ("rewards", rewards))


def check_ranking(rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str, *, least: int = 2) -> None:
    """Check the arguments of a loss of rankings of `least` to 64 answers."""
    check_rewards(rewards, reduction)
    if not least <= rewards.shape[1] <= MAX_K:
        raise ValueError(f"rewards must be (B, K) with K from {least} to {MAX_K}; got {describe(rewards)}")
    check_like_rewards("ranks", ranks, rewards, INTEGER, "an int64 or int32 tensor (B, K), rank 0 the best")
    if mask is not None:
        check_like_rewards("mask", mask, rewards, (torch.bool,), "a bool tensor (B, K), True where an answer counts")


def check_pairwise(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None, center_weight: float, reduction: str
) -> tuple[Tensor | float | None, float]:
    """Check `pairwise_reward_loss`'s arguments. Return the margin and `center_weight`, with numbers as floats."""
    check_vectors(chosen=chosen, rejected=rejected)
    check_choice("reduction", reduction, REDUCTIONS)
    return check_margin(margin, ("chosen", chosen)), check_finite("center_weight", center_weight, least=0.0)


def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`fastpref.pairwise_reward_loss` in plain PyTorch."""
    margin, center_weight = check_pairwise(chosen, rejected, margin, center_weight, reduction)
    chosen, rejected = widen(chosen, rejected)
    u = chosen - rejected
    if margin is not None:
        u = u - (margin.detach().to(u.dtype) if isinstance(margin, Tensor) else margin)
    losses = -F.logsigmoid(u)
    if center_weight:
        losses = losses + center_weight * (chosen + rejected) ** 2
    return reduce(losses, reduction)


def best_of_k_loss(rewards: Tensor, best: Tensor, *, reduction: str = "mean") -> Tensor:
    """`fastpref.best_of_k_loss` in plain PyTorch."""
    check_best(rewards, best, reduction)
    (rewards,) = widen(rewards)
    if reduction == "mean" and not rewards.shape[0]:
        reduction = "sum"  # a mean over nothing is 0
    try:
        return F.cross_entropy(rewards, best.long(), reduction=reduction, ignore_index=_NONE_IGNORED)
    except IndexError:
        row = int(((best < 0) | (best >= rewards.shape[1])).nonzero()[0])
        raise IndexError(f"best[{row}] is {int(best[row])}, outside [0, {rewards.shape[1]})") from None


def ranking_loss(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """`fastpref.ranking_loss` in plain PyTorch."""
    check_ranking(rewards, ranks, mask, reduction)
    (rewards,) = widen(rewards)
    better = ranks[:, :, None] < ranks[:, None, :]
    if mask is not None:
        # Zeros, and not only a masked sum, so that an inf or NaN at a masked answer reaches no gradient.
        rewards = rewards.masked_fill(~mask, 0.0)
        better = better & mask[:, :, None] & mask[:, None, :]
    # What is no pair is left out before its difference, which may be of two infinities, reaches a gradient.
    differences = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~better, 0.0)
    losses = -F.logsigmoid(differences).masked_fill(~better, 0.0).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)
    return reduce(losses, reduction)


def plackett_luce_loss(
    rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """`fastpref.plackett_luce_loss` in plain PyTorch."""
    check_ranking(rewards, ranks, mask, reduction, least=1)
    (rewards,) = widen(rewards)
    counted = torch.ones_like(ranks, dtype=torch.bool) if mask is None else mask
    both = counted[:, :, None] & counted[:, None, :]
    if rewards.device.type == "cpu" and not torch.compiler.is_compiling():
        tied = both & (ranks[:, :, None] == ranks[:, None, :])
        tied = tied.triu(1).any((1, 2))
        if tied.any():
            row = int(tied.nonzero()[0])
            raise ValueError(f"ranks must not tie among answers that count; got {ranks[row].tolist()} for prompt {row}")
    # Zeros, so that an inf or NaN at a masked answer reaches no gradient; a prompt's common offset costs no digits.
    rewards = rewards.masked_fill(~counted, 0.0)
    top = rewards.detach().masked_fill(~counted, -torch.inf).amax(-1, keepdim=True)
    rewards = rewards - top.masked_fill(top == -torch.inf, 0.0)
    # Answer i is chosen from among those that are not ranked above it, itself included.
    among = both & (ranks[:, None, :] >= ranks[:, :, None])
    choices = rewards[:, None, :].masked_fill(~(among | ~counted[:, :, None]), -torch.inf)
    losses = (choices.logsumexp(-1) - rewards).masked_fill(~counted, 0.0).sum(-1)
    return reduce(losses, reduction)


def ranks_from_scores(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Ranks of K answers from their scores: how many answers that count have a higher score.

    The best has rank 0, equal scores have equal ranks, and the ranks of masked answers come after all others.

    Args:
        scores: (B, K), any dtype but bool and complex; NaN is not a score, and is below all.
        mask: (B, K) bool, True where an answer counts; None counts all.

    Returns:
        (B, K) int64, for `ranking_loss` and `plackett_luce_loss`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices differ.
    """
    check_tensor("scores", scores, (*FLOATING, *INTEGER, torch.int16, torch.int8, torch.uint8), "numbers (B, K)")
    if scores.dim() != 2:
        raise shape_error("scores", scores, "(B, K), K answers a prompt", 2)
    if mask is not None:
        check_tensor("mask", mask, (torch.bool,), "a bool tensor (B, K), True where an answer counts")
        if mask.shape != scores.shape:
            raise shape_error("mask", mask, f"of scores' shape, {tuple(scores.shape)}", 2)
        check_same_device("mask", mask, "scores", scores)
    lacking = scores.isnan() if scores.is_floating_point() else torch.zeros_like(scores, dtype=torch.bool)
    counted = torch.ones_like(lacking) if mask is None else mask
    # Higher, or a score where there is none.
    higher = (scores[:, None, :] > scores[:, :, None]) | (lacking[:, :, None] & ~lacking[:, None, :])
    ranks = (higher & counted[:, None, :]).sum(-1)
    return ranks.masked_fill(~counted, scores.shape[1])

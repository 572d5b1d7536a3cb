"""Reward-model losses on scalar rewards: pairwise, best of K, all pairs of a ranking, and the ranking as a whole."""

from __future__ import annotations

from torch import Tensor

from fastpref.losses._launch import fused, launch
from fastpref.reference.losses import reward as reference
from fastpref.reference.losses.reward import ranks_from_scores

__all__ = ["best_of_k_loss", "pairwise_reward_loss", "plackett_luce_loss", "ranking_loss", "ranks_from_scores"]


def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Bradley–Terry loss of a reward model: −log σ(chosen − rejected − margin) + c·(chosen + rejected)².

    From arXiv 2009.01325; the margin from arXiv 2307.09288, the centring term from arXiv 2312.09244.

    Args:
        chosen: (B,) rewards of the preferred answers, any floating dtype; computed in float32 (float64 for float64).
        rejected: (B,) rewards of the others.
        margin: None, a number, or (B,), integers too: how far apart a pair should at least be. Carries no gradient.
        center_weight: c ≥ 0, the pull of a pair's mean reward towards 0.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no pairs is 0.

    Returns:
        The loss, a scalar, or (B,) with "none".

    Raises:
        TypeError: a tensor of a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    if not fused(chosen):
        return reference.pairwise_reward_loss(
            chosen, rejected, margin=margin, center_weight=center_weight, reduction=reduction
        )
    margin, center_weight = reference.check_pairwise(chosen, rejected, margin, center_weight, reduction)
    per_pair, constant = (margin, 0.0) if isinstance(margin, Tensor) else (None, margin or 0.0)
    tensors = (chosen, rejected, per_pair)
    return launch("pairwise_reward_loss", reduction, tensors, (constant, center_weight))[0]


def best_of_k_loss(rewards: Tensor, best: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of picking the best of K answers: −log softmax(rewards)[best] (arXiv 1909.08593, there K = 4).

    Args:
        rewards: (B, K), any floating dtype; computed in float32 (float64 for float64).
        best: (B,) int64 or int32, the index of each prompt's best answer.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no prompts is 0.

    Returns:
        The loss, a scalar, or (B,) with "none".

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices differ, or an option is out of range.
        IndexError: `best` is outside [0, K); on a CPU, outside of `torch.compile`. A GPU gives NaN.
    """
    if not fused(rewards):
        return reference.best_of_k_loss(rewards, best, reduction=reduction)
    reference.check_best(rewards, best, reduction)
    return launch("best_of_k_loss", reduction, (rewards, best), ())[0]


def ranking_loss(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Every pair of a ranking in one batch element: −1/P Σ log σ(r_i − r_j) over i ranked better than j.

    P is the prompt's number of such pairs, K(K−1)/2 without ties (arXiv 2203.02155, there K = 4 to 9). Ties and masked
    answers drop out of the sum and of P; a prompt with no pair left gives 0.

    Args:
        rewards: (B, K), K from 2 to 64, any floating dtype; computed in float32 (float64 for float64).
        ranks: (B, K) int64 or int32, 0 the best; equal ranks are ties.
        mask: (B, K) bool, True where an answer counts; None counts all.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no prompts is 0.

    Returns:
        The loss, a scalar, or (B,) with "none".

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices differ, K is out of range, or an option is.
    """
    if not fused(rewards):
        return reference.ranking_loss(rewards, ranks, mask=mask, reduction=reduction)
    reference.check_ranking(rewards, ranks, mask, reduction)
    return launch("ranking_loss", reduction, (rewards, ranks, mask), ())[0]


def plackett_luce_loss(
    rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Likelihood of a whole ranking: each answer chosen from among those not ranked above it.

    −Σ_i [r_(i) − log Σ_{j≥i} exp r_(j)] in the order of the ranks: Plackett–Luce, the K-way form of arXiv 2305.18290
    (appendix A.3). On implicit rewards it is K-way DPO.

    Args:
        rewards: (B, K), K up to 64, any floating dtype; computed in float32 (float64 for float64).
        ranks: (B, K) int64 or int32, a smaller one better, no two alike among the answers of a prompt that count.
        mask: (B, K) bool, True where an answer counts, both as chosen and to be chosen from; None counts all.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no prompts is 0.

    Returns:
        The loss, a scalar, or (B,) with "none"; 0 for a prompt with less than two answers that count.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices differ, or an option is out of range; ranks tie among answers that count, on a CPU
            and outside of `torch.compile`. Elsewhere tied answers are chosen each from among the other too.
    """
    if not fused(rewards):
        return reference.plackett_luce_loss(rewards, ranks, mask=mask, reduction=reduction)
    reference.check_ranking(rewards, ranks, mask, reduction, least=1)
    return launch("plackett_luce_loss", reduction, (rewards, ranks, mask), ())[0]

"""Reward-model losses on scalar rewards: pairwise, best of K, all pairs of a ranking, and the ranking as a whole."""

from __future__ import annotations

from torch import Tensor

from fastpref._core.loss_checks import check_best, check_pairwise, check_ranking, check_scores, check_untied
from fastpref.losses._launch import fused, launch
from fastpref.reference.losses import reward as formula

__all__ = ["best_of_k_loss", "pairwise_reward_loss", "plackett_luce_loss", "ranking_loss", "ranks_from_scores"]


def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the Bradley–Terry loss of B pairs, −log σ(chosen − rejected − margin) + c·(chosen + rejected)².

    The loss is that of arXiv 2009.01325, the margin that of arXiv 2307.09288, the centring term that of arXiv
    2312.09244.

    Args:
        chosen: (B,) rewards of the preferred answers, any floating dtype; computed in float32 (float64 for float64).
        rejected: (B,) rewards of the others.
        margin: None, a number, or (B,), floating point or integers: how far apart the rewards of a pair should at least
            be. It gets no gradient.
        center_weight: c ≥ 0, the pull of a pair's mean reward towards 0.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no pairs is 0.

    Returns:
        The loss, a scalar, or (B,) with "none".

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    margin, center_weight = check_pairwise(chosen, rejected, margin, center_weight, reduction)
    if not fused(chosen):
        return formula.pairwise_reward_loss(
            chosen, rejected, margin=margin, center_weight=center_weight, reduction=reduction
        )
    per_pair, constant = (margin, 0.0) if isinstance(margin, Tensor) else (None, margin or 0.0)
    tensors = (chosen, rejected, per_pair)
    return launch("pairwise_reward_loss", reduction, tensors, (constant, center_weight))[0]


def best_of_k_loss(rewards: Tensor, best: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of picking the best of K answers, −log softmax(rewards)[best] (arXiv 1909.08593).

    Args:
        rewards: (B, K), any floating dtype; computed in float32 (float64 for float64).
        best: (B,) int64 or int32, the index of each prompt's best answer.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no prompts is 0.

    Returns:
        The loss, a scalar, or (B,) with "none".

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
        IndexError: `best` is outside [0, K); on a CPU, outside of `torch.compile`. A GPU gives NaN.
    """
    check_best(rewards, best, reduction)
    if not fused(rewards):
        return formula.best_of_k_loss(rewards, best, reduction=reduction)
    return launch("best_of_k_loss", reduction, (rewards, best), ())[0]


def ranking_loss(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Return the loss of all pairs of B rankings, −1/P Σ log σ(r_i − r_j) over i ranked better than j.

    P is the number of such pairs of the prompt, K(K−1)/2 without ties (arXiv 2203.02155, where K is 4 to 9). Ties and
    masked answers are left out of the sum and of P. The loss of a prompt with no pair left is 0.

    Args:
        rewards: (B, K), K from 2 to 64, any floating dtype; computed in float32 (float64 for float64).
        ranks: (B, K) int64 or int32, 0 the best; equal ranks are ties.
        mask: (B, K) bool, True where an answer counts; None counts all.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no prompts is 0.

    Returns:
        The loss, a scalar, or (B,) with "none".

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or K or an option is out of range.
    """
    check_ranking(rewards, ranks, mask, reduction)
    if not fused(rewards):
        return formula.ranking_loss(rewards, ranks, mask=mask, reduction=reduction)
    return launch("ranking_loss", reduction, (rewards, ranks, mask), ())[0]


def plackett_luce_loss(
    rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Return the negative log-likelihood of B rankings, −Σ_i [r_(i) − log Σ_{j≥i} exp r_(j)] in the order of the ranks.

    This is the Plackett–Luce model: each answer is chosen from among those that are not ranked above it (arXiv
    2305.18290, appendix A.3). On implicit rewards it is K-way DPO.

    Args:
        rewards: (B, K), K up to 64, any floating dtype; computed in float32 (float64 for float64).
        ranks: (B, K) int64 or int32, where a smaller rank is better. The answers of a prompt that count have distinct
            ranks.
        mask: (B, K) bool, True where an answer counts; None counts all. Other answers are not chosen, and are no
            candidates.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no prompts is 0.

    Returns:
        The loss, a scalar, or (B,) with "none"; 0 for a prompt with fewer than two answers that count.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range; on a CPU and outside of `torch.compile`,
            also ranks that tie among answers that count. Elsewhere ties raise no error, and each of the tied answers is
            chosen from among candidates that include the other ones.
    """
    check_ranking(rewards, ranks, mask, reduction, least=1)
    if not fused(rewards):
        check_untied(ranks, mask)
        return formula.plackett_luce_loss(rewards, ranks, mask=mask, reduction=reduction)
    return launch("plackett_luce_loss", reduction, (rewards, ranks, mask), ())[0]


def ranks_from_scores(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the ranks of K answers: how many answers that count have a higher score.

    The best answer has rank 0, equal scores have equal ranks, and the ranks of masked answers come after all others.

    Args:
        scores: (B, K), any dtype but bool and complex; NaN ranks below every number.
        mask: (B, K) bool, True where an answer counts; None counts all.

    Returns:
        (B, K) int64, for `ranking_loss` and `plackett_luce_loss`.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes or devices differ.
    """
    check_scores(scores, mask)
    return formula.ranks_from_scores(scores, mask=mask)

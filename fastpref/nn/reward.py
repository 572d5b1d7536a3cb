"""Modules of the reward-model losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.losses.reward import best_of_k_loss, pairwise_reward_loss, plackett_luce_loss, ranking_loss
from fastpref.nn.module import Loss, empty


class PairwiseRewardLoss(Loss):
    """Compute `fastpref.pairwise_reward_loss`, the loss of a reward model on pairs (arXiv 2009.01325).

    It replaces OpenRLHF's `PairWiseLoss`, and its `LogExpLoss`, which is the same function of the two rewards.

    Args:
        margin: None, or a number: how far apart the rewards of a pair should at least be.
        center_weight: c ≥ 0, the pull of a pair's mean reward towards 0.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an option is unknown, has a wrong type, or is a tensor.
        ValueError: an option is out of range.
    """

    def __init__(self, *, margin: float | None = None, center_weight: float = 0.0, reduction: str = "mean") -> None:
        super().__init__(margin=margin, center_weight=center_weight, reduction=reduction)
        self.forward(empty(), empty())

    def forward(self, chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None) -> Tensor:
        """Return the loss of B pairs.

        Args:
            chosen: (B,) rewards of the preferred answers, any floating dtype.
            rejected: (B,) rewards of the others.
            margin: a number or (B,), floating point or integers, instead of the constructor's margin.

        Returns:
            The loss, a scalar, or (B,) with "none".

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes or devices differ.
        """
        options = {**self.options, "margin": self.options["margin"] if margin is None else margin}
        return pairwise_reward_loss(chosen, rejected, **options)


class BestOfKLoss(Loss):
    """Compute `fastpref.best_of_k_loss`, the loss of the best of K answers (arXiv 1909.08593).

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an option is unknown or has a wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.forward(empty(2), empty(dtype=torch.long))

    def forward(self, rewards: Tensor, best: Tensor) -> Tensor:
        """Return the loss of B prompts.

        Args:
            rewards: (B, K), any floating dtype.
            best: (B,) int64 or int32, the index of each prompt's best answer.

        Returns:
            The loss, a scalar, or (B,) with "none".

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes or devices differ.
            IndexError: `best` is outside [0, K); on a CPU, outside of `torch.compile`.
        """
        return best_of_k_loss(rewards, best, **self.options)


class RankingLoss(Loss):
    """Compute `fastpref.ranking_loss`, the loss of all pairs of a ranking (arXiv 2203.02155).

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an option is unknown or has a wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.forward(empty(2), empty(2, dtype=torch.long))

    def forward(self, rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the loss of B prompts.

        Args:
            rewards: (B, K), K from 2 to 64, any floating dtype; implicit rewards make it K-way DPO.
            ranks: (B, K) int64 or int32, 0 the best; equal ranks are ties.
            mask: (B, K) bool, True where an answer counts; None counts all.

        Returns:
            The loss, a scalar, or (B,) with "none".

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes or devices differ, or K is out of range.
        """
        return ranking_loss(rewards, ranks, mask=mask, **self.options)


class PlackettLuceLoss(Loss):
    """Compute `fastpref.plackett_luce_loss`, the likelihood of a ranking (arXiv 2305.18290, appendix A.3).

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an option is unknown or has a wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.forward(empty(2), empty(2, dtype=torch.long))

    def forward(self, rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the loss of B prompts.

        Args:
            rewards: (B, K), K up to 64, any floating dtype; implicit rewards make it K-way DPO.
            ranks: (B, K) int64 or int32, where a smaller rank is better. The answers of a prompt that count have
                distinct ranks.
            mask: (B, K) bool, True where an answer counts; None counts all.

        Returns:
            The loss, a scalar, or (B,) with "none".

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes or devices differ, K is out of range, or, on a CPU and outside of `torch.compile`, ranks
                tie among answers that count.
        """
        return plackett_luce_loss(rewards, ranks, mask=mask, **self.options)

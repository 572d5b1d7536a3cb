"""The definitions of losses against numbers worked out by hand."""

from __future__ import annotations

import math

import torch

from fastpref import reference
from tests.helpers.by_hand import THIRD, WIN, close, tensor


class TestLosses:
    def test_dpo_of_equal_log_ratios_is_log_two(self) -> None:
        result = reference.dpo_loss(tensor(-3.0), tensor(-5.0), tensor(-4.0), tensor(-6.0))
        close(result.loss, math.log(2))
        close(result.chosen_rewards, 0.1)
        close(result.rejected_rewards, 0.1)

    def test_dpo_of_one_nat_at_beta_one(self) -> None:
        logps = (tensor(-2.0), tensor(-5.0), tensor(-3.0), tensor(-5.0))
        close(reference.dpo_loss(*logps, beta=1.0).loss, -WIN)
        close(reference.dpo_loss(*logps, beta=1.0, label_smoothing=0.25).loss, -0.75 * WIN - 0.25 * (WIN - 1))

    def test_dpo_without_a_reference(self) -> None:
        result = reference.dpo_loss(tensor(-2.0), tensor(-3.0), beta=1.0, reference_free=True)
        close(result.loss, -WIN)
        close(result.chosen_rewards, -2)
        # Given ones are not used either.
        given = reference.dpo_loss(tensor(-2.0), tensor(-3.0), tensor(9.0), tensor(7.0), beta=1.0, reference_free=True)
        close(given.loss, -WIN)
        close(given.rejected_rewards, -3)

    def test_dpo_gradient_at_zero_is_half_beta(self) -> None:
        chosen, rejected = tensor(-3.0).requires_grad_(), tensor(-3.0).requires_grad_()
        reference.dpo_loss(chosen, rejected, tensor(-3.0), tensor(-3.0), beta=0.5).loss.backward()
        assert chosen.grad is not None
        assert rejected.grad is not None
        close(chosen.grad, -0.25)
        close(rejected.grad, 0.25)

    def test_margins_and_accuracies(self) -> None:
        result = reference.dpo_loss(
            tensor(-2.0, -4.0), tensor(-3.0, -4.0), tensor(0.0, 0.0), tensor(0.0, 0.0), beta=1.0
        )
        close(result.margins, 1, 0)
        assert result.accuracies.tolist() == [1, 0]

    def test_implicit_reward(self) -> None:
        close(reference.implicit_reward(tensor(-3.0), tensor(-5.0), beta=0.25), 0.5)

    def test_pairwise_reward(self) -> None:
        close(reference.pairwise_reward_loss(tensor(2.0), tensor(1.0)), -WIN)
        close(reference.pairwise_reward_loss(tensor(2.0), tensor(1.0), margin=1.0), math.log(2))
        close(reference.pairwise_reward_loss(tensor(3.0), tensor(0.0), margin=tensor(2.0)), -WIN)
        close(reference.pairwise_reward_loss(tensor(2.0), tensor(1.0), center_weight=0.5), -WIN + 0.5 * 9)

    def test_best_of_k(self) -> None:
        close(reference.best_of_k_loss(tensor([1.0, 0.0]), torch.tensor([0])), -WIN)
        close(reference.best_of_k_loss(tensor([5.0, 5.0, 5.0]), torch.tensor([2])), -THIRD)

    def test_ranking_is_the_mean_over_ordered_pairs(self) -> None:
        # Differences along the ranking 2 > 1 > 0: log σ(1), log σ(1) and log σ(2).
        rewards, ranks = tensor([0.0, 1.0, 2.0]), torch.tensor([[2, 1, 0]])
        close(reference.ranking_loss(rewards, ranks), (-2 * WIN + math.log1p(math.exp(-2))) / 3)

    def test_ranking_drops_ties_and_masked_answers(self) -> None:
        rewards = tensor([1.0, 0.0, 0.0])
        close(reference.ranking_loss(rewards, torch.tensor([[0, 1, 1]])), -WIN)
        mask = torch.tensor([[True, False, True]])
        close(reference.ranking_loss(rewards, torch.tensor([[0, 1, 2]]), mask=mask), -WIN)
        close(reference.ranking_loss(rewards, torch.tensor([[3, 3, 3]])), 0)

    def test_reductions(self) -> None:
        chosen, rejected = tensor(1.0, 0.0), tensor(0.0, 0.0)
        close(reference.pairwise_reward_loss(chosen, rejected, reduction="none"), -WIN, math.log(2))
        close(reference.pairwise_reward_loss(chosen, rejected, reduction="sum"), -WIN + math.log(2))
        close(reference.pairwise_reward_loss(chosen, rejected), (-WIN + math.log(2)) / 2)


def test_gradcheck_implicit_reward() -> None:
    logps = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.implicit_reward(x[0], x[1], beta=0.3), logps)

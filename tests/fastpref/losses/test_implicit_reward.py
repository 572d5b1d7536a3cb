"""Implicit rewards, and the losses of reward models on them, which are K-way DPO."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from fastpref import dpo_loss, implicit_reward, plackett_luce_loss, ranking_loss
from tests.helpers.masks import some_orders
from tests.oracles.reward import plackett_luce, ranking


class TestImplicitReward:
    def test_any_shape_and_differentiable(self) -> None:
        logps, ref = torch.randn(2, 3, 4).requires_grad_(), torch.randn(2, 3, 4)
        reward = implicit_reward(logps, ref, beta=0.5)
        torch.testing.assert_close(reward, (logps - ref) / 2)
        reward.sum().backward()
        assert logps.grad is not None
        assert (logps.grad == 0.5).all()

    def test_low_precision_is_widened_before_the_difference(self) -> None:
        # In bf16 the difference of these two, a multiple of 1/16, would be rounded to 8 bits.
        logps, ref = torch.tensor([-100.5]).bfloat16(), torch.tensor([-3.015625]).bfloat16()
        reward = implicit_reward(logps, ref, beta=1.0)
        assert reward.dtype == torch.float32
        assert reward.item() == -97.484375


class TestOfImplicitRewards:
    """The same losses on β(logp − ref) are K-way DPO."""

    @pytest.mark.parametrize("answers", [2, 4, 9])
    def test_ranking_is_dpo_of_every_pair(self, answers: int) -> None:
        logps, ref = torch.randn(2, 3, answers, dtype=torch.float64) * 5
        ranks, leaf = some_orders(3, answers), logps.clone().requires_grad_()
        loss = ranking_loss(implicit_reward(leaf, ref, beta=0.3), ranks)
        other = logps.clone().requires_grad_()
        pairs = []
        for b in range(3):
            for i, j in combinations(range(answers), 2):
                w, l = (i, j) if ranks[b, i] < ranks[b, j] else (j, i)  # noqa: E741
                pairs.append((b, w, l))
        b, w, l = torch.tensor(pairs).T  # noqa: E741
        wanted = dpo_loss(other[b, w], other[b, l], ref[b, w], ref[b, l], beta=0.3).loss
        torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
        slopes = torch.autograd.grad(loss, leaf), torch.autograd.grad(wanted, other)
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)
        brute = [ranking(r, k) for r, k in zip((0.3 * (logps - ref)).tolist(), ranks.tolist(), strict=True)]
        assert loss.item() == pytest.approx(math.fsum(brute) / 3, rel=1e-12)

    def test_plackett_luce_is_its_ordered_product(self) -> None:
        logps, ref = torch.randn(2, 3, 5, dtype=torch.float64) * 5
        ranks = some_orders(3, 5)
        got = plackett_luce_loss(implicit_reward(logps, ref, beta=0.3), ranks, reduction="none").tolist()
        rewards = (0.3 * (logps - ref)).tolist()
        assert got == pytest.approx(
            [plackett_luce(r, k) for r, k in zip(rewards, ranks.tolist(), strict=True)], rel=1e-12
        )

    def test_plackett_luce_of_two_is_dpo(self) -> None:
        w, l, rw, rl = 5 * torch.randn(4, 6, dtype=torch.float64)  # noqa: E741
        rewards = implicit_reward(torch.stack((w, l), 1), torch.stack((rw, rl), 1), beta=0.2)
        ranks = torch.tensor([[0, 1]]).expand(6, 2)
        for loss in (ranking_loss, plackett_luce_loss):
            torch.testing.assert_close(loss(rewards, ranks), dpo_loss(w, l, rw, rl, beta=0.2).loss, rtol=1e-13, atol=0)


class TestRefusals:
    def test_implicit_reward(self) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"ref_logps must .*\(2,\).*\(3,\)"):
            implicit_reward(x, torch.zeros(3))
        with pytest.raises(TypeError, match=r"logps must .*int64"):
            implicit_reward(x.long(), x)
        with pytest.raises(ValueError, match=r"beta must .*-1"):
            implicit_reward(x, x, beta=-1.0)

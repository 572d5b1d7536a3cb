"""Losses of a reward model from pairs and from the best of K answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastpref import best_of_k_loss, pairwise_reward_loss, ranking_loss
from tests.helpers.marks import wide_dtypes
from tests.oracles.reward import pairwise


class TestPairwise:
    @pytest.mark.parametrize("margin", [None, 0.5, "each"])
    @pytest.mark.parametrize("center", [0.0, 0.01])
    def test_formula(self, margin: Any, center: float) -> None:
        chosen, rejected, each = (torch.randn(6, dtype=torch.float64) for _ in range(3))
        given = each if margin == "each" else margin
        got = pairwise_reward_loss(chosen, rejected, margin=given, center_weight=center, reduction="none")
        for i in range(6):
            m = each[i].item() if margin == "each" else margin or 0.0
            a, b = chosen[i].item(), rejected[i].item()
            assert got[i].item() == pytest.approx(pairwise(a, b, m, center), rel=1e-12)

    def test_margin_carries_no_gradient(self) -> None:
        chosen, margin = torch.randn(3).requires_grad_(), torch.randn(3).requires_grad_()
        pairwise_reward_loss(chosen, torch.randn(3), margin=margin).backward()
        assert chosen.grad is not None
        assert margin.grad is None

    def test_float64_margin_does_not_widen_the_loss(self) -> None:
        x = torch.randn(3)
        assert pairwise_reward_loss(x, -x, margin=torch.ones(3, dtype=torch.float64)).dtype == torch.float32


class TestPairwiseReward:
    """Margins and a pull of the rewards towards 0."""

    @pytest.mark.parametrize("margin", [None, 0.75, "each"])
    @pytest.mark.parametrize("center", [0.0, 0.01, 1.0])
    @wide_dtypes
    def test_values_and_slopes(self, margin: Any, center: float, dtype: torch.dtype) -> None:
        a, b, each = (2 * torch.randn(6, dtype=torch.float64).to(dtype) for _ in range(3))
        given = each if margin == "each" else margin
        chosen, rejected = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss = pairwise_reward_loss(chosen, rejected, margin=given, center_weight=center, reduction="none")
        slopes = torch.autograd.grad(loss.sum(), (chosen, rejected))
        eps = torch.finfo(dtype).eps
        for i in range(6):
            x, y = a[i].item(), b[i].item()
            given = each[i].item() if margin == "each" else margin or 0.0
            gap = x - y - given
            assert loss[i].item() == pytest.approx(pairwise(x, y, given, center), rel=16 * eps, abs=16 * eps)
            pull, push = 1 / (1 + math.exp(gap)), 2 * center * (x + y)
            assert slopes[0][i].item() == pytest.approx(push - pull, rel=16 * eps, abs=32 * eps)
            assert slopes[1][i].item() == pytest.approx(push + pull, rel=16 * eps, abs=32 * eps)

    def test_by_hand(self) -> None:
        chosen, rejected = torch.tensor([math.log(3)], dtype=torch.float64), torch.zeros(1).double()
        assert pairwise_reward_loss(chosen, rejected).item() == pytest.approx(math.log(4 / 3), rel=1e-14)
        at_margin = pairwise_reward_loss(chosen, rejected, margin=math.log(3))
        assert at_margin.item() == pytest.approx(math.log(2), rel=1e-14)
        centred = pairwise_reward_loss(torch.ones(1), 2 * torch.ones(1), center_weight=0.5)
        assert centred.item() == pytest.approx(math.log1p(math.e) + 4.5, rel=1e-6)

    def test_centring_vanishes_at_opposite_rewards(self) -> None:
        x = torch.randn(5)
        assert torch.equal(pairwise_reward_loss(x, -x, center_weight=3.0), pairwise_reward_loss(x, -x))

    @pytest.mark.parametrize("scale", [1e2, 1e4])
    def test_extremes(self, scale: float) -> None:
        chosen, rejected = torch.tensor([scale, -scale]).requires_grad_(), torch.tensor([-scale, scale])
        loss = pairwise_reward_loss(
            chosen, rejected, center_weight=1.0, margin=torch.tensor([1.0, 2.0]), reduction="none"
        )
        assert loss.tolist() == pytest.approx([math.exp(1 - 2 * scale), 2 * scale + 2], rel=1e-6, abs=1e-30)
        assert torch.autograd.grad(loss.sum(), chosen)[0].tolist() == pytest.approx([0, -1], abs=1e-30)


class TestBestOfK:
    def test_formula(self) -> None:
        rewards, best = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2])
        got = best_of_k_loss(rewards, best, reduction="none")
        for row, i, value in zip(rewards.tolist(), best.tolist(), got.tolist(), strict=True):
            assert value == pytest.approx(math.log(math.fsum(math.exp(r) for r in row)) - row[i], rel=1e-12)

    def test_a_common_offset_changes_nothing(self) -> None:
        rewards, best = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2], dtype=torch.int32)
        torch.testing.assert_close(best_of_k_loss(rewards + 1e3, best), best_of_k_loss(rewards, best))

    def test_one_answer_is_certain(self) -> None:
        assert best_of_k_loss(torch.randn(3, 1), torch.zeros(3, dtype=torch.long)).item() == 0


class TestRefusals:
    def test_rewards(self) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"center_weight must .*-1"):
            pairwise_reward_loss(x, x, center_weight=-1.0)
        with pytest.raises(ValueError, match=r"center_weight must .*nan"):
            pairwise_reward_loss(x, x, center_weight=math.nan)
        for answers in (1, 65):
            with pytest.raises(ValueError, match=rf"rewards must .*2 to 64.*{answers}"):
                ranking_loss(torch.zeros(2, answers), torch.zeros(2, answers, dtype=torch.long))
        with pytest.raises(ValueError, match=r"rewards must .*\(B, K\).*\(2, 0\)"):
            best_of_k_loss(torch.zeros(2, 0), torch.zeros(2, dtype=torch.long))
        for bad in (3, -1):
            with pytest.raises(IndexError, match=rf"best\[1\] is {bad}.*\[0, 3\)"):
                best_of_k_loss(torch.zeros(2, 3), torch.tensor([0, bad]))

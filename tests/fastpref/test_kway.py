"""Losses of K answers to one prompt, and the ranks they take, against brute force: a pair or a place at a time."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref import (
    dpo_loss,
    implicit_reward,
    pairwise_reward_loss,
    plackett_luce_loss,
    ranking_loss,
    ranks_from_scores,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BAD = (math.nan, math.inf, -math.inf)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def plackett_luce(rewards: list[float], ranks: list[int], mask: list[bool] | None = None) -> float:
    """Place by place: the best of those left is drawn from a softmax over them."""
    left = [i for i in range(len(rewards)) if mask is None or mask[i]]
    left.sort(key=lambda i: ranks[i])
    ordered = [rewards[i] for i in left]
    return math.fsum(log_sum_exp(ordered[i:]) - ordered[i] for i in range(len(ordered)))


def plackett_luce_gradient(rewards: list[float], ranks: list[int], mask: list[bool]) -> list[float]:
    left = sorted((i for i in range(len(rewards)) if mask[i]), key=lambda i: ranks[i])
    gradient = [0.0] * len(rewards)
    for place, first in enumerate(left):
        total = log_sum_exp([rewards[i] for i in left[place:]])
        for i in left[place:]:
            gradient[i] += math.exp(rewards[i] - total)
        gradient[first] -= 1
    return gradient


def all_pairs(rewards: list[float], ranks: list[int], mask: list[bool] | None = None) -> float:
    losses = [
        softplus(rewards[j] - rewards[i] if ranks[i] < ranks[j] else rewards[i] - rewards[j])
        for i, j in combinations(range(len(rewards)), 2)
        if (mask is None or (mask[i] and mask[j])) and ranks[i] != ranks[j]
    ]
    return math.fsum(losses) / len(losses) if losses else 0.0


def orders(batch: int, answers: int) -> Tensor:
    return torch.stack([torch.randperm(answers) for _ in range(batch)]) if batch else torch.zeros(0, answers).long()


def ragged(batch: int, answers: int) -> Tensor:
    """A mask that leaves none, one, two and all, then any number."""
    mask = torch.rand(batch, answers) < 0.6
    for row, count in enumerate((0, 1, 2, answers)):
        if row < batch:
            mask[row] = torch.arange(answers) < count
            mask[row] = mask[row][torch.randperm(answers)]
    return mask


class TestPlackettLuce:
    @pytest.mark.parametrize("answers", [1, 2, 3, 4, 7, 9, 16, 33, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_formula(self, answers: int, dtype: torch.dtype) -> None:
        rewards = (2 * torch.randn(7, answers, dtype=torch.float64)).to(dtype).requires_grad_()
        ranks, mask = orders(7, answers), ragged(7, answers)
        eps = torch.finfo(dtype).eps
        for which in (None, mask):
            each = plackett_luce_loss(rewards, ranks, mask=which, reduction="none")
            counted = torch.ones_like(mask) if which is None else which
            rows = list(zip(rewards.tolist(), ranks.tolist(), counted.tolist(), strict=True))
            for row, value in zip(rows, each.tolist(), strict=True):
                assert value == pytest.approx(plackett_luce(*row), rel=16 * eps, abs=16 * eps)
            (got,) = torch.autograd.grad(each.sum(), rewards)
            for row, slopes in zip(rows, got.tolist(), strict=True):
                assert slopes == pytest.approx(plackett_luce_gradient(*row), rel=32 * eps, abs=4 * answers * eps)
            total = plackett_luce_loss(rewards, ranks, mask=which, reduction="sum")
            torch.testing.assert_close(total, each.sum())
            # Over all prompts, those without an answer among them.
            torch.testing.assert_close(plackett_luce_loss(rewards, ranks, mask=which), each.sum() / 7)

    def test_by_hand(self) -> None:
        rewards = torch.tensor([[math.log(2), math.log(3), math.log(5)]], dtype=torch.float64)
        got = plackett_luce_loss(rewards, torch.tensor([[1, 2, 0]]))
        assert got.item() == pytest.approx(-math.log(5 / 10 * 2 / 5), rel=1e-14)
        got = plackett_luce_loss(rewards, torch.tensor([[1, 2, 0]]), mask=torch.tensor([[True, True, False]]))
        assert got.item() == pytest.approx(-math.log(2 / 5), rel=1e-14)
        assert plackett_luce_loss(torch.zeros(1, 4), torch.arange(4)[None]).item() == pytest.approx(math.log(24))

    def test_probabilities_of_all_orders_sum_to_one(self) -> None:
        rewards = 2 * torch.randn(4, dtype=torch.float64)
        every = torch.tensor(list(permutations(range(4))))
        each = plackett_luce_loss(rewards.expand(24, 4), every, reduction="none")
        assert each.neg().exp().sum().item() == pytest.approx(1, rel=1e-14)

    def test_the_first_places_do_not_depend_on_the_rest(self) -> None:
        """Summed over the orders of the last two, the probability of the first two is their own."""
        rewards = torch.randn(1, 4, dtype=torch.float64)
        ranks = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2]])
        both = plackett_luce_loss(rewards.expand(2, 4), ranks, reduction="none").neg().exp().sum()
        p = rewards[0].softmax(0)
        assert both.item() == pytest.approx((p[0] * p[1] / (1 - p[0])).item(), rel=1e-13)

    def test_two_answers_are_the_pairwise_loss(self) -> None:
        chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
        got = plackett_luce_loss(
            torch.stack((rejected, chosen), 1), torch.tensor([[1, 0]]).expand(5, 2), reduction="none"
        )
        torch.testing.assert_close(
            got, pairwise_reward_loss(chosen, rejected, reduction="none"), rtol=1e-13, atol=1e-15
        )

    def test_a_common_offset_changes_nothing(self) -> None:
        rewards, ranks = torch.randn(5, 6, dtype=torch.float64), orders(5, 6)
        torch.testing.assert_close(plackett_luce_loss(rewards + 1e3, ranks), plackett_luce_loss(rewards, ranks))

    def test_only_the_order_of_ranks_counts(self) -> None:
        rewards, ranks = torch.randn(5, 6, dtype=torch.float64), orders(5, 6)
        wanted = plackett_luce_loss(rewards, ranks)
        assert torch.equal(plackett_luce_loss(rewards, 10 * ranks - 7), wanted)
        assert torch.equal(plackett_luce_loss(rewards, ranks.int()), wanted)

    @pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_extremes(self, scale: float, dtype: torch.dtype) -> None:
        rewards = torch.tensor([[1, -1, 0.5, 0], [-1, 1, 1, -1], [1, 1, 1, 1]], dtype=dtype) * scale
        leaf, ranks = rewards.requires_grad_(), torch.tensor([[0, 3, 1, 2], [0, 1, 2, 3], [3, 2, 1, 0]])
        each = plackett_luce_loss(leaf, ranks, reduction="none")
        (got,) = torch.autograd.grad(each.sum(), leaf)
        rounding = 8 * torch.finfo(dtype).eps * scale
        for b in range(3):
            row = (rewards[b].tolist(), ranks[b].tolist(), [True] * 4)
            assert each[b].item() == pytest.approx(plackett_luce(*row), rel=rounding, abs=rounding)
            assert got[b].tolist() == pytest.approx(plackett_luce_gradient(*row), abs=rounding)

    def test_a_tail_keeps_its_digits(self) -> None:
        rewards = torch.tensor([[40.0, 0.0, -40.0]])
        got = plackett_luce_loss(rewards, torch.arange(3)[None]).item()
        assert got == pytest.approx(2 * math.exp(-40), rel=1e-5)

    @pytest.mark.parametrize("count", [0, 1])
    def test_nothing_left_to_order(self, count: int) -> None:
        leaf = torch.randn(3, 5).requires_grad_()
        mask = (torch.arange(5) < count).expand(3, 5)
        each = plackett_luce_loss(leaf, orders(3, 5), mask=mask, reduction="none")
        assert each.tolist() == [0, 0, 0]
        assert (torch.autograd.grad(each.sum(), leaf)[0] == 0).all()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_empty(self, reduction: str) -> None:
        leaf = torch.zeros(0, 4).requires_grad_()
        loss = plackett_luce_loss(leaf, torch.zeros(0, 4, dtype=torch.long), reduction=reduction)
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert loss.sum().item() == 0
        assert torch.autograd.grad(loss.sum(), leaf)[0].shape == (0, 4)

    def test_ties_are_refused(self) -> None:
        rewards = torch.randn(3, 4)
        ranks = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 2], [3, 2, 1, 0]])
        with pytest.raises(ValueError, match=r"ranks.*1"):
            plackett_luce_loss(rewards, ranks)
        # Among counted answers alone: two masked ones may tie, with each other or with those that count.
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[1, 2] = False
        tied = plackett_luce_loss(rewards, ranks, mask=mask, reduction="none")
        wanted = plackett_luce(rewards[1].tolist(), ranks[1].tolist(), mask[1].tolist())
        assert tied[1].item() == pytest.approx(wanted, rel=1e-6)
        with pytest.raises(ValueError, match="ranks"):
            plackett_luce_loss(rewards, torch.tensor([0, 1, 0, 2]).expand(3, 4), mask=mask)
        plackett_luce_loss(rewards, torch.zeros(3, 4).long(), mask=torch.zeros(3, 4, dtype=torch.bool))

    def test_refusals(self) -> None:
        rewards, ranks = torch.zeros(2, 3), torch.arange(3).expand(2, 3)
        with pytest.raises(ValueError, match=r"ranks must .*\(2, 3\).*\(2, 4\)"):
            plackett_luce_loss(rewards, torch.arange(4).expand(2, 4))
        with pytest.raises(TypeError, match=r"ranks must .*float32"):
            plackett_luce_loss(rewards, ranks.float())
        with pytest.raises(TypeError, match=r"mask must .*bool.*int64"):
            plackett_luce_loss(rewards, ranks, mask=ranks)
        with pytest.raises(TypeError, match=r"rewards must .*int64"):
            plackett_luce_loss(rewards.long(), ranks)
        with pytest.raises(ValueError, match=r"rewards must .*\(3,\)"):
            plackett_luce_loss(rewards[0], ranks[0])
        with pytest.raises(ValueError, match=r"reduction must .*'batchmean'"):
            plackett_luce_loss(rewards, ranks, reduction="batchmean")

    def test_gradcheck(self) -> None:
        rewards, ranks, mask = torch.randn(5, 4, dtype=torch.float64).requires_grad_(), orders(5, 4), ragged(5, 4)
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda r, how=reduction: plackett_luce_loss(r, ranks, mask=mask, reduction=how), (rewards,)
            )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        rewards, ranks = torch.randn(4, 5).to(dtype), orders(4, 5)
        got = plackett_luce_loss(rewards, ranks)
        assert got.dtype == torch.float32
        assert torch.equal(got, plackett_luce_loss(rewards.float(), ranks))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_traces_whole(self) -> None:
        torch.compiler.reset()
        leaf, ranks, mask = torch.randn(5, 4).requires_grad_(), orders(5, 4), ragged(5, 4)
        compiled = torch.compile(plackett_luce_loss, fullgraph=True, backend="aot_eager")
        answers = []
        for function in (plackett_luce_loss, compiled):
            loss = function(leaf, ranks, mask=mask)
            answers.append([loss, *torch.autograd.grad(loss, leaf)])
        torch.testing.assert_close(*answers)


LOSSES = pytest.mark.parametrize("loss", [ranking_loss, plackett_luce_loss], ids=["ranking", "plackett_luce"])


class TestBoth:
    @LOSSES
    def test_order_of_the_answers_does_not_count(self, loss: Any) -> None:
        rewards, ranks, mask = torch.randn(6, 7, dtype=torch.float64), orders(6, 7), ragged(6, 7)
        order = torch.randperm(7)
        there, here = rewards[:, order].requires_grad_(), rewards.clone().requires_grad_()
        moved = loss(there, ranks[:, order], mask=mask[:, order], reduction="none")
        wanted = loss(here, ranks, mask=mask, reduction="none")
        torch.testing.assert_close(moved, wanted, rtol=1e-13, atol=1e-14)
        slopes = [torch.autograd.grad(x.sum(), leaf)[0] for x, leaf in ((moved, there), (wanted, here))]
        torch.testing.assert_close(slopes[0], slopes[1][:, order], rtol=1e-13, atol=1e-14)

    @LOSSES
    @pytest.mark.parametrize("value", BAD)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_is_masked_is_harmless(self, loss: Any, value: float, dtype: torch.dtype) -> None:
        rewards, ranks, mask = torch.randn(6, 5).to(dtype), orders(6, 5), ragged(6, 5)
        answers = []
        for filled in (rewards, rewards.masked_fill(~mask, value)):
            leaf = filled.clone().requires_grad_()
            each = loss(leaf, ranks, mask=mask, reduction="none")
            mean = loss(leaf, ranks, mask=mask)
            answers.append([each, mean, *torch.autograd.grad(each.sum(), leaf), *torch.autograd.grad(mean, leaf)])
        for clean, harmed in zip(*answers, strict=True):
            assert torch.equal(clean, harmed)
        assert (answers[1][2][~mask] == 0).all()

    @LOSSES
    def test_a_masked_answer_is_an_absent_one(self, loss: Any) -> None:
        rewards, ranks = torch.randn(6, 5, dtype=torch.float64), orders(6, 5)
        mask = torch.ones(6, 5, dtype=torch.bool)
        mask[:, 2] = False
        there = [0, 1, 3, 4]
        torch.testing.assert_close(loss(rewards, ranks, mask=mask), loss(rewards[:, there], ranks[:, there]))

    @LOSSES
    def test_a_mask_of_true_is_none(self, loss: Any) -> None:
        rewards, ranks = torch.randn(6, 5), orders(6, 5)
        assert torch.equal(loss(rewards, ranks, mask=torch.ones(6, 5, dtype=torch.bool)), loss(rewards, ranks))

    @LOSSES
    def test_nan_of_one_prompt_stays_there(self, loss: Any) -> None:
        rewards, ranks = torch.randn(3, 4), orders(3, 4)
        wanted = loss(rewards, ranks, reduction="none")
        rewards[1, 2] = math.nan
        got = loss(rewards, ranks, reduction="none")
        assert got[1].isnan()
        assert torch.equal(got[[0, 2]], wanted[[0, 2]])

    @LOSSES
    def test_worse_orders_cost_more(self, loss: Any) -> None:
        rewards = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        ordered = [loss(rewards, torch.tensor([ranks])).item() for ranks in ([0, 1, 2, 3], [0, 1, 3, 2], [3, 2, 1, 0])]
        assert ordered == sorted(ordered)
        assert len(set(ordered)) == 3


class TestOfImplicitRewards:
    """The same losses on β(logp − ref) are K-way DPO."""

    @pytest.mark.parametrize("answers", [2, 4, 9])
    def test_ranking_is_dpo_of_every_pair(self, answers: int) -> None:
        logps, ref = torch.randn(2, 3, answers, dtype=torch.float64) * 5
        ranks, leaf = orders(3, answers), logps.clone().requires_grad_()
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
        brute = [all_pairs(r, k) for r, k in zip((0.3 * (logps - ref)).tolist(), ranks.tolist(), strict=True)]
        assert loss.item() == pytest.approx(math.fsum(brute) / 3, rel=1e-12)

    def test_plackett_luce_is_its_ordered_product(self) -> None:
        logps, ref = torch.randn(2, 3, 5, dtype=torch.float64) * 5
        ranks = orders(3, 5)
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


def check_ranks(scores: Tensor, ranks: Tensor, mask: Tensor | None = None) -> None:
    """Better scores have lower ranks, equal scores equal ones, and the best of every prompt has rank 0."""
    assert ranks.shape == scores.shape
    assert not ranks.is_floating_point()
    for b in range(len(scores)):
        counted = [i for i in range(scores.shape[1]) if mask is None or mask[b, i]]
        for i, j in combinations(counted, 2):
            assert (scores[b, i] > scores[b, j]).item() == (ranks[b, i] < ranks[b, j]).item()
            assert (scores[b, i] == scores[b, j]).item() == (ranks[b, i] == ranks[b, j]).item()
        if counted:
            assert min(ranks[b, i].item() for i in counted) == 0


class TestRanksFromScores:
    @pytest.mark.parametrize("answers", [1, 2, 5, 64])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32], ids=str)
    def test_order(self, answers: int, dtype: torch.dtype) -> None:
        scores = torch.randint(-3, 4, (6, answers)).to(dtype)
        check_ranks(scores, ranks_from_scores(scores))
        mask = ragged(6, answers)
        check_ranks(scores, ranks_from_scores(scores, mask=mask), mask)

    def test_by_hand(self) -> None:
        assert ranks_from_scores(torch.tensor([[0.5, 2.0, -1.0]])).tolist() == [[1, 0, 2]]
        assert ranks_from_scores(torch.tensor([[7.0, 7.0, 7.0]])).tolist() == [[0, 0, 0]]
        (ranks,) = ranks_from_scores(torch.tensor([[1.0, 3.0, 1.0, 3.0]])).tolist()
        assert ranks[1] == ranks[3] == 0
        assert ranks[0] == ranks[2] > 0

    def test_scores_apart_by_a_rounding(self) -> None:
        a = torch.tensor(1e4)
        assert ranks_from_scores(torch.stack((a, torch.nextafter(a, a + 1)))[None]).tolist() == [[1, 0]]

    def test_large_integers_are_not_rounded(self) -> None:
        assert ranks_from_scores(torch.tensor([[2**53, 2**53 + 1]])).tolist() == [[1, 0]]

    def test_infinities_are_scores(self) -> None:
        assert ranks_from_scores(torch.tensor([[0.0, math.inf, -math.inf]])).tolist() == [[1, 0, 2]]

    @pytest.mark.parametrize("value", BAD)
    def test_what_is_masked_is_harmless(self, value: float) -> None:
        scores, mask = torch.randn(6, 5), ragged(6, 5)
        harmed = ranks_from_scores(scores.masked_fill(~mask, value), mask=mask)
        check_ranks(scores, harmed, mask)
        rewards = torch.randn(6, 5)
        for loss in (ranking_loss, plackett_luce_loss):
            wanted = loss(rewards, ranks_from_scores(scores, mask=mask), mask=mask, reduction="none")
            assert torch.equal(loss(rewards, harmed, mask=mask, reduction="none"), wanted)

    def test_empty(self) -> None:
        assert ranks_from_scores(torch.zeros(0, 4)).shape == (0, 4)

    def test_carries_no_gradient(self) -> None:
        assert not ranks_from_scores(torch.randn(2, 3).requires_grad_()).requires_grad

    def test_feeds_the_losses(self) -> None:
        scores, rewards = torch.randn(5, 6), torch.randn(5, 6, dtype=torch.float64)
        got = plackett_luce_loss(rewards, ranks_from_scores(scores), reduction="none").tolist()
        wanted = [plackett_luce(r, [-x for x in s]) for r, s in zip(rewards.tolist(), scores.tolist(), strict=True)]
        assert got == pytest.approx(wanted, rel=1e-12)
        tied = scores.round()
        got = ranking_loss(rewards, ranks_from_scores(tied), reduction="none").tolist()
        wanted = [all_pairs(r, [-x for x in s]) for r, s in zip(rewards.tolist(), tied.tolist(), strict=True)]
        assert got == pytest.approx(wanted, rel=1e-12)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_traces_whole(self) -> None:
        torch.compiler.reset()
        scores, mask = torch.randn(4, 5), ragged(4, 5)
        compiled = torch.compile(ranks_from_scores, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(scores, mask=mask), ranks_from_scores(scores, mask=mask))

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"scores must .*\(3,\)"):
            ranks_from_scores(torch.zeros(3))
        with pytest.raises(ValueError, match=r"mask must .*\(2, 3\).*\(2, 4\)"):
            ranks_from_scores(torch.zeros(2, 3), mask=torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"mask must .*bool.*float32"):
            ranks_from_scores(torch.zeros(2, 3), mask=torch.ones(2, 3))


class TestPairwiseReward:
    """Margins and centring."""

    @pytest.mark.parametrize("margin", [None, 0.75, "each"])
    @pytest.mark.parametrize("center", [0.0, 0.01, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_values_and_slopes(self, margin: Any, center: float, dtype: torch.dtype) -> None:
        a, b, each = (2 * torch.randn(6, dtype=torch.float64).to(dtype) for _ in range(3))
        given = each if margin == "each" else margin
        chosen, rejected = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss = pairwise_reward_loss(chosen, rejected, margin=given, center_weight=center, reduction="none")
        slopes = torch.autograd.grad(loss.sum(), (chosen, rejected))
        eps = torch.finfo(dtype).eps
        for i in range(6):
            x, y = a[i].item(), b[i].item()
            gap = x - y - (each[i].item() if margin == "each" else margin or 0.0)
            assert loss[i].item() == pytest.approx(softplus(-gap) + center * (x + y) ** 2, rel=16 * eps, abs=16 * eps)
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


any_of = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@any_of
@given(
    batch=st.integers(0, 4), answers=st.integers(2, 64), seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 3.0, 100.0]), density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    index=st.sampled_from([torch.int32, torch.int64]), reduction=st.sampled_from(["mean", "sum", "none"]),
)  # fmt: skip
def test_anything(
    batch: int,
    answers: int,
    seed: int,
    dtype: torch.dtype,
    scale: float,
    density: float,
    index: torch.dtype,
    reduction: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = (scale * torch.randn(batch, answers, generator=generator)).to(dtype)
    scores = torch.randn(batch, answers, generator=generator)
    mask = torch.rand(batch, answers, generator=generator) < density
    ranks = ranks_from_scores(scores, mask=mask)
    check_ranks(scores, ranks, mask)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for loss, oracle in ((plackett_luce_loss, plackett_luce), (ranking_loss, all_pairs)):
        got = loss(rewards, ranks.to(index), mask=mask, reduction=reduction)
        rows = zip(rewards.double().tolist(), ranks.tolist(), mask.tolist(), strict=True)
        wanted = torch.tensor([oracle(*row) for row in rows], dtype=torch.float64)
        if reduction != "none":
            wanted = wanted.sum() / (max(batch, 1) if reduction == "mean" else 1)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        # As far off as the roundings of the rewards' differences and of the sums over them.
        torch.testing.assert_close(got.double(), wanted, rtol=16 * eps, atol=16 * eps * scale * answers)


def test_minus_infinity_that_counts_loses_every_pair_and_harms_no_gradient() -> None:
    rewards = torch.tensor([[1.0, -torch.inf, 0.0]], requires_grad=True)
    loss = ranking_loss(rewards, torch.tensor([[0, 2, 1]]))
    loss.backward()
    # Two of the three pairs are won for certain.
    torch.testing.assert_close(loss.detach(), torch.tensor(math.log1p(math.exp(-1.0)) / 3))
    assert rewards.grad is not None
    assert rewards.grad.isfinite().all()
    assert rewards.grad[0, 1] == 0


def test_an_offset_costs_a_masked_plackett_luce_no_digits() -> None:
    rewards = torch.tensor([[0.3, -1.2, 0.7, 9.0]])
    ranks, mask = torch.tensor([[1, 2, 0, 3]]), torch.tensor([[True, True, True, False]])
    far = rewards - 16384  # whose digits are those of multiples of 2^-9
    near = far + 16384
    torch.testing.assert_close(
        plackett_luce_loss(far, ranks, mask=mask), plackett_luce_loss(near, ranks, mask=mask),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip

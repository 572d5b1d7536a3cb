"""Losses of a ranking of K answers, and the ranks of scores, against brute force: a pair or a place at a time."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import (
    dpo_loss,
    implicit_reward,
    pairwise_reward_loss,
    plackett_luce_loss,
    ranking_loss,
    ranks_from_scores,
    reference,
)
from tests.helpers.marks import examples, wide_dtypes
from tests.helpers.masks import some_answers, some_orders
from tests.oracles.reward import plackett_luce, plackett_luce_gradient, ranking
from tests.tolerance import DTYPES, assert_accurate

BAD = (math.nan, math.inf, -math.inf)


class TestRanking:
    @pytest.mark.parametrize("answers", [2, 3, 4, 7, 9, 16, 33, 64])
    def test_formula(self, answers: int) -> None:
        rewards = 2 * torch.randn(6, answers, dtype=torch.float64)
        ranks = torch.randint(max(2, answers // 2), (6, answers))
        mask = torch.rand(6, answers) < 0.7
        mask[0] = False
        got = ranking_loss(rewards, ranks, mask=mask, reduction="none")
        for b in range(6):
            wanted = ranking(rewards[b].tolist(), ranks[b].tolist(), mask[b].tolist())
            assert got[b].item() == pytest.approx(wanted, rel=1e-12)
        # And the mean is over all prompts, those without a pair among them.
        torch.testing.assert_close(ranking_loss(rewards, ranks, mask=mask), got.sum() / 6)

    def test_without_ties_the_divisor_is_k_choose_two(self) -> None:
        rewards = torch.zeros(1, 9)
        got = ranking_loss(rewards, torch.randperm(9)[None])
        assert got.item() == pytest.approx(math.log(2))

    def test_two_answers_are_the_pairwise_loss(self) -> None:
        chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
        leaf = torch.stack((rejected, chosen), 1).requires_grad_()
        pair = torch.stack((rejected, chosen), 1).requires_grad_()
        got = ranking_loss(leaf, torch.tensor([[1, 0]]).expand(5, 2), reduction="none")
        wanted = pairwise_reward_loss(pair[:, 1], pair[:, 0], reduction="none")
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-15)
        got.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(leaf.grad, pair.grad, rtol=1e-14, atol=1e-15)

    def test_all_ties_are_zero_with_zero_gradient(self) -> None:
        rewards = torch.randn(3, 4).requires_grad_()
        loss = ranking_loss(rewards, torch.full((3, 4), 2), reduction="none")
        loss.sum().backward()
        assert loss.tolist() == [0, 0, 0]
        assert rewards.grad is not None
        assert (rewards.grad == 0).all()

    def test_only_the_order_of_ranks_counts(self) -> None:
        rewards = torch.randn(2, 4, dtype=torch.float64)
        ranks = torch.tensor([[0, 1, 1, 2], [3, 0, 2, 1]])
        assert torch.equal(ranking_loss(rewards, ranks), ranking_loss(rewards, ranks.int() * 10 - 7))

    def test_order_of_the_answers_does_not_count(self) -> None:
        rewards, ranks, order = torch.randn(2, 6, dtype=torch.float64), torch.randint(4, (2, 6)), torch.randperm(6)
        torch.testing.assert_close(ranking_loss(rewards[:, order], ranks[:, order]), ranking_loss(rewards, ranks))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_masked_is_harmless(self, value: float) -> None:
        rewards, ranks = torch.randn(3, 5), torch.stack([torch.randperm(5) for _ in range(3)])
        mask = torch.ones(3, 5, dtype=torch.bool)
        mask[0, 1] = mask[2, :] = False
        clean = rewards.clone().requires_grad_()
        harmed = rewards.masked_fill(~mask, value).requires_grad_()
        losses = [ranking_loss(r, ranks, mask=mask, reduction="none") for r in (clean, harmed)]
        assert torch.equal(*losses)
        gradients = [
            torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip(losses, (clean, harmed), strict=True)
        ]
        assert torch.equal(*gradients)
        assert (gradients[1][~mask] == 0).all()

    def test_of_implicit_rewards_is_dpo_of_all_pairs(self) -> None:
        logps, ref = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
        got = ranking_loss(implicit_reward(logps, ref), torch.arange(4)[None])
        better, worse = zip(*combinations(range(4), 2), strict=True)
        wanted = dpo_loss(logps[0, better], logps[0, worse], ref[0, better], ref[0, worse]).loss
        torch.testing.assert_close(got, wanted)


class TestPlackettLuce:
    @pytest.mark.parametrize("answers", [1, 2, 3, 4, 7, 9, 16, 33, 64])
    @wide_dtypes
    def test_formula(self, answers: int, dtype: torch.dtype) -> None:
        rewards = (2 * torch.randn(7, answers, dtype=torch.float64)).to(dtype).requires_grad_()
        ranks, mask = some_orders(7, answers), some_answers(7, answers)
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
        """Summed over the orders of the last two answers, the probability is that of the first two."""
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
        rewards, ranks = torch.randn(5, 6, dtype=torch.float64), some_orders(5, 6)
        torch.testing.assert_close(plackett_luce_loss(rewards + 1e3, ranks), plackett_luce_loss(rewards, ranks))

    def test_only_the_order_of_ranks_counts(self) -> None:
        rewards, ranks = torch.randn(5, 6, dtype=torch.float64), some_orders(5, 6)
        wanted = plackett_luce_loss(rewards, ranks)
        assert torch.equal(plackett_luce_loss(rewards, 10 * ranks - 7), wanted)
        assert torch.equal(plackett_luce_loss(rewards, ranks.int()), wanted)

    @pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
    @wide_dtypes
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
        each = plackett_luce_loss(leaf, some_orders(3, 5), mask=mask, reduction="none")
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
        rewards, ranks, mask = (
            torch.randn(5, 4, dtype=torch.float64).requires_grad_(),
            some_orders(5, 4),
            some_answers(5, 4),
        )
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda r, how=reduction: plackett_luce_loss(r, ranks, mask=mask, reduction=how), (rewards,)
            )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        rewards, ranks = torch.randn(4, 5).to(dtype), some_orders(4, 5)
        got = plackett_luce_loss(rewards, ranks)
        assert got.dtype == torch.float32
        assert torch.equal(got, plackett_luce_loss(rewards.float(), ranks))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_traces_whole(self) -> None:
        torch.compiler.reset()
        leaf, ranks, mask = torch.randn(5, 4).requires_grad_(), some_orders(5, 4), some_answers(5, 4)
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
        rewards, ranks, mask = torch.randn(6, 7, dtype=torch.float64), some_orders(6, 7), some_answers(6, 7)
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
        rewards, ranks, mask = torch.randn(6, 5).to(dtype), some_orders(6, 5), some_answers(6, 5)
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
        rewards, ranks = torch.randn(6, 5, dtype=torch.float64), some_orders(6, 5)
        mask = torch.ones(6, 5, dtype=torch.bool)
        mask[:, 2] = False
        there = [0, 1, 3, 4]
        torch.testing.assert_close(loss(rewards, ranks, mask=mask), loss(rewards[:, there], ranks[:, there]))

    @LOSSES
    def test_a_mask_of_true_is_none(self, loss: Any) -> None:
        rewards, ranks = torch.randn(6, 5), some_orders(6, 5)
        assert torch.equal(loss(rewards, ranks, mask=torch.ones(6, 5, dtype=torch.bool)), loss(rewards, ranks))

    @LOSSES
    def test_nan_of_one_prompt_stays_there(self, loss: Any) -> None:
        rewards, ranks = torch.randn(3, 4), some_orders(3, 4)
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


def check_ranks(scores: Tensor, ranks: Tensor, mask: Tensor | None = None) -> None:
    """Check that better scores have lower ranks, equal scores equal ranks, and the best of every prompt rank 0."""
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
        mask = some_answers(6, answers)
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
        scores, mask = torch.randn(6, 5), some_answers(6, 5)
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
        wanted = [ranking(r, [-x for x in s]) for r, s in zip(rewards.tolist(), tied.tolist(), strict=True)]
        assert got == pytest.approx(wanted, rel=1e-12)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_traces_whole(self) -> None:
        torch.compiler.reset()
        scores, mask = torch.randn(4, 5), some_answers(4, 5)
        compiled = torch.compile(ranks_from_scores, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(scores, mask=mask), ranks_from_scores(scores, mask=mask))

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"scores must .*\(3,\)"):
            ranks_from_scores(torch.zeros(3))
        with pytest.raises(ValueError, match=r"mask must .*\(2, 3\).*\(2, 4\)"):
            ranks_from_scores(torch.zeros(2, 3), mask=torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"mask must .*bool.*float32"):
            ranks_from_scores(torch.zeros(2, 3), mask=torch.ones(2, 3))


@examples(100)
@given(
    batch=st.integers(0, 4),
    answers=st.integers(2, 64),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    index=st.sampled_from([torch.int32, torch.int64]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
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
    for loss, oracle in ((plackett_luce_loss, plackett_luce), (ranking_loss, ranking)):
        got = loss(rewards, ranks.to(index), mask=mask, reduction=reduction)
        rows = zip(rewards.double().tolist(), ranks.tolist(), mask.tolist(), strict=True)
        wanted = torch.tensor([oracle(*row) for row in rows], dtype=torch.float64)
        if reduction != "none":
            wanted = wanted.sum() / (max(batch, 1) if reduction == "mean" else 1)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        # As far off as the roundings of the rewards' differences and of the sums over them.
        torch.testing.assert_close(got.double(), wanted, rtol=16 * eps, atol=16 * eps * scale * answers)


@examples(100)
@given(data=st.data(), batch=st.integers(0, 4), answers=st.integers(2, 12), dtype=st.sampled_from(DTYPES[1:]))
def test_ranking_loss(data: Any, batch: int, answers: int, dtype: torch.dtype) -> None:
    """However answers are ranked and masked, a prompt's loss and gradient are those of its counted answers alone."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    rewards = (10 * torch.randn(batch, answers, generator=generator)).to(dtype)
    ranks = torch.randint(data.draw(st.integers(1, answers)), (batch, answers), generator=generator)
    mask = torch.rand(batch, answers, generator=generator) < data.draw(st.sampled_from([0.3, 0.8, 1.0]))
    leaf = rewards.masked_fill(~mask, float("nan")).requires_grad_()
    losses = ranking_loss(leaf, ranks, mask=mask, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    for b in range(batch):
        keep = mask[b]
        if keep.sum() < 2:
            assert losses[b] == 0
            assert not gradient[b].any()
            continue
        alone = {}
        for kind in (dtype, torch.float64):
            kept = rewards[b, keep].to(kind)[None].requires_grad_()
            loss = reference.ranking_loss(kept, ranks[b, keep][None])
            alone[kind] = (loss, torch.autograd.grad(loss, kept)[0][0])
        assert_accurate(losses[b], alone[dtype][0], alone[torch.float64][0], "loss", slack=8.0)
        assert_accurate(gradient[b, keep], alone[dtype][1], alone[torch.float64][1], "gradient", slack=8.0)
        assert not gradient[b, ~keep].any()


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
        plackett_luce_loss(far, ranks, mask=mask),
        plackett_luce_loss(near, ranks, mask=mask),
        rtol=1e-6,
        atol=1e-6,
    )

"""Every loss of `fastpref.losses.TABLE` against its definition, and each one's own properties against oracles."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import best_of_k_loss, dpo_loss, implicit_reward, pairwise_reward_loss, ranking_loss
from fastpref.losses import RLHF, TABLE, Loss, rlhf
from tests.tolerance import assert_accurate

every_loss = pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)
Arguments = tuple[tuple[Tensor, ...], dict[str, Any]]


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def example(loss: Loss, batch: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Arguments:
    """The loss's typical call, its differentiable tensors multiplied by `scale`, and everything rounded to `dtype`."""
    tensors, options = loss.example(torch.Generator().manual_seed(batch), batch)
    tensors = tuple(cast(t * scale if t.is_floating_point() else t, dtype) for t in tensors)
    return tensors, {**loss.options, **{name: cast(value, dtype) for name, value in options.items()}}


def value_of(result: Any) -> Tensor:
    return result.loss if isinstance(result, tuple) else result


def evaluate(function: Callable[..., Any], arguments: Arguments, dtype: torch.dtype, **more: Any) -> list[Tensor]:
    """The loss, what is reported beside it, and the gradient of every floating-point argument."""
    tensors, options = arguments
    options = {name: cast(value, dtype) for name, value in options.items()}
    leaves = [cast(t, dtype).detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    result = function(*leaves, **options, **more)
    value = value_of(result)
    weight = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float32).to(value.dtype).view(value.shape)
    value.backward(weight)
    # A likelihood has the rejected completion nowhere in it: eager then makes no gradient, and a kernel one of zeros.
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.is_floating_point()]
    return [*(result if isinstance(result, tuple) else (result,)), *gradients]


class TestEveryLoss:
    def test_table_is_complete(self) -> None:
        assert len({loss.name for loss in TABLE}) == len(TABLE)
        for loss in TABLE:
            assert loss.name.split(":")[0] == loss.function.__name__ == loss.reference.__name__
            assert inspect.signature(loss.function) == inspect.signature(loss.reference), loss.name
            assert re.fullmatch(r"\d{4}\.\d{5}", loss.paper)
            assert loss.formula
            assert loss.meaning
            assert hasattr(torch.ops.fastpref, loss.operator)

    def test_rlhf_is_listed_whole(self) -> None:
        functions = {name for name in rlhf.__all__ if inspect.isfunction(getattr(rlhf, name))}
        assert {entry.name for entry in RLHF} == functions
        for entry in RLHF:
            assert entry.function.__name__ == entry.reference.__name__ == entry.name
            assert re.fullmatch(r"\d{4}\.\d{5}", entry.paper)

    @every_loss
    @pytest.mark.parametrize("scale", [1.0, 100.0], ids=["typical", "large"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_against_the_definition(self, loss: Loss, dtype: torch.dtype, reduction: str, scale: float) -> None:
        arguments = example(loss, 9, dtype, scale)
        truth = evaluate(loss.reference, arguments, torch.float64, reduction=reduction)
        # Float32 is what eager would be given: a (B,) loss is never computed in less.
        eager = evaluate(loss.reference, arguments, torch.promote_types(dtype, torch.float32), reduction=reduction)
        ours = evaluate(loss.function, arguments, dtype, reduction=reduction)
        results = len(truth) - sum(t.is_floating_point() for t in arguments[0])
        for i, (got, peer, right) in enumerate(zip(ours, eager, truth, strict=True)):
            assert_accurate(got, peer if i < results else peer.to(dtype), right, f"{loss.name}[{i}]")

    @every_loss
    def test_gradcheck(self, loss: Loss) -> None:
        tensors, options = example(loss, 3)
        leaves = [t.requires_grad_(t.is_floating_point()) for t in tensors]
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda *x, how=reduction: value_of(loss.function(*x, **options, reduction=how)), leaves
            )

    @every_loss
    def test_reductions_agree(self, loss: Loss) -> None:
        tensors, options = example(loss, 7)
        each = value_of(loss.function(*tensors, **options, reduction="none"))
        assert each.shape == (7,)
        close = torch.testing.assert_close
        close(value_of(loss.function(*tensors, **options, reduction="sum")), each.sum(), rtol=1e-14, atol=0)
        close(value_of(loss.function(*tensors, **options, reduction="mean")), each.sum() / 7, rtol=1e-14, atol=0)
        close(value_of(loss.function(*tensors, **options)), each.sum() / 7, rtol=1e-14, atol=0)

    @every_loss
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_empty_batch(self, loss: Loss, reduction: str) -> None:
        result, *rest = evaluate(loss.function, example(loss, 0), torch.float64, reduction=reduction)
        assert result.shape == ((0,) if reduction == "none" else ())
        assert result.sum() == 0
        assert all(value.numel() == 0 for value in rest)

    @every_loss
    def test_batch_of_one(self, loss: Loss) -> None:
        tensors, options = example(loss, 1)
        mean = value_of(loss.function(*tensors, **options))
        assert mean.shape == ()
        assert torch.equal(mean, value_of(loss.function(*tensors, **options, reduction="none"))[0])

    @every_loss
    def test_each_element_is_its_own_unless_the_table_says_it_mixes(self, loss: Loss) -> None:
        tensors, options = example(loss, 6, torch.float32)
        each = value_of(loss.function(*tensors, **options, reduction="none"))
        alone = torch.cat([
            value_of(loss.function(
                *(t[i : i + 1] for t in tensors), reduction="none",
                **{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in options.items()},
            ))
            for i in range(6)
        ])  # fmt: skip
        assert torch.allclose(alone, each, rtol=3e-7, atol=3e-7) != loss.mixes

    @every_loss
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
    def test_extremes_are_finite(self, loss: Loss, scale: float, dtype: torch.dtype) -> None:
        for values in evaluate(loss.function, example(loss, 16, dtype, scale), dtype):
            assert values.isfinite().all()

    @every_loss
    def test_strided_inputs(self, loss: Loss) -> None:
        tensors, options = example(loss, 5)
        wanted = value_of(loss.function(*tensors, **options, reduction="none"))
        strided = [torch.stack((t, t), -1)[..., 0] for t in tensors]
        assert not any(t.is_contiguous() for t in strided)
        assert torch.equal(value_of(loss.function(*strided, **options, reduction="none")), wanted)

    @every_loss
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self, loss: Loss) -> None:
        torch.compiler.reset()
        compiled = torch.compile(loss.function, fullgraph=True, backend="aot_eager")
        arguments = example(loss, 5)
        both = (evaluate(function, arguments, torch.float64) for function in (loss.function, compiled))
        for wanted, got in zip(*both, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-15)


class TestRefusals:
    """An error names the argument, what was given and what is wanted."""

    @every_loss
    def test_dtypes(self, loss: Loss) -> None:
        tensors, options = example(loss, 4)
        for i, name in enumerate(list(inspect.signature(loss.function).parameters)[: len(tensors)]):
            wrong = tensors[i].long() if tensors[i].is_floating_point() else tensors[i].double()
            with pytest.raises(TypeError, match=rf"{name} must be .*{wrong.dtype}"):
                loss.function(*tensors[:i], wrong, *tensors[i + 1 :], **options)
        for name, value in options.items():
            if isinstance(value, Tensor):
                with pytest.raises(TypeError, match=rf"{name} must be .*torch.complex64"):
                    loss.function(*tensors, **{**options, name: value.to(torch.complex64)})

    @every_loss
    def test_shapes(self, loss: Loss) -> None:
        tensors, options = example(loss, 4)
        names = list(inspect.signature(loss.function).parameters)[: len(tensors)]
        for i, name in enumerate(names[1:], 1):
            longer = torch.cat((tensors[i], tensors[i][:1]))
            with pytest.raises(ValueError, match=rf"{name} must .*4.*5"):
                loss.function(*tensors[:i], longer, *tensors[i + 1 :], **options)
        for name, value in options.items():
            if isinstance(value, Tensor) and name != "kl":  # estimates, as many as there are
                with pytest.raises(ValueError, match=rf"{name} must .*4.*3"):
                    loss.function(*tensors, **{**options, name: value[:3]})
        with pytest.raises(ValueError, match=names[0]):
            loss.function(*(t[None] for t in tensors), **options)

    @every_loss
    def test_devices(self, loss: Loss) -> None:
        tensors, options = example(loss, 4)
        for i, name in enumerate(list(inspect.signature(loss.function).parameters)[1 : len(tensors)], 1):
            with pytest.raises(ValueError, match=rf"{name} must be on .*cpu.*meta"):
                loss.function(*tensors[:i], tensors[i].to("meta"), *tensors[i + 1 :], **options)

    @every_loss
    def test_reduction(self, loss: Loss) -> None:
        tensors, options = example(loss, 4)
        with pytest.raises(ValueError, match=r"reduction must be .*'mean'.*'batchmean'"):
            loss.function(*tensors, **options, reduction="batchmean")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"beta": 0.0}, r"beta must be .*above 0.*0\.0"),
            ({"beta": math.nan}, r"beta must be .*nan"),
            ({"beta": math.inf}, r"beta must be a finite.*inf"),
            ({"beta": None}, r"beta must be .*None"),
            ({"label_smoothing": -0.1}, r"label_smoothing must be .*\[0, 1\].*-0\.1"),
            ({"label_smoothing": 1.1}, r"label_smoothing must be .*\[0, 1\].*1\.1"),
            ({"label_smoothing": math.nan}, r"label_smoothing must be .*nan"),
            ({"loss_type": "dpo"}, r"loss_type must be .*'sigmoid'.*'dpo'"),
        ],
    )
    def test_dpo_options(self, options: dict[str, Any], words: str) -> None:
        x = torch.zeros(2)
        with pytest.raises((ValueError, TypeError), match=words):
            dpo_loss(x, x, x, x, **options)

    def test_dpo_without_its_reference(self) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"'sigmoid' needs ref_chosen_logps.*reference_free"):
            dpo_loss(x, x)
        with pytest.raises(ValueError, match=r"'sigmoid' needs ref_rejected_logps.*reference_free"):
            dpo_loss(x, x, x)

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

    def test_implicit_reward(self) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"ref_logps must .*\(2,\).*\(3,\)"):
            implicit_reward(x, torch.zeros(3))
        with pytest.raises(TypeError, match=r"logps must .*int64"):
            implicit_reward(x.long(), x)
        with pytest.raises(ValueError, match=r"beta must .*-1"):
            implicit_reward(x, x, beta=-1.0)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


class TestDpo:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
    def test_formula(self, beta: float, smoothing: float) -> None:
        w, l, rw, rl = (torch.randn(6, dtype=torch.float64) * 20 for _ in range(4))  # noqa: E741
        result = dpo_loss(w, l, rw, rl, beta=beta, label_smoothing=smoothing, reduction="none")
        for i in range(6):
            u = beta * ((w[i] - rw[i]) - (l[i] - rl[i])).item()
            wanted = -(1 - smoothing) * log_sigmoid(u) - smoothing * log_sigmoid(-u)
            assert result.loss[i].item() == pytest.approx(wanted, rel=1e-12)
        torch.testing.assert_close(result.chosen_rewards, beta * (w - rw))
        torch.testing.assert_close(result.rejected_rewards, beta * (l - rl))

    @pytest.mark.parametrize("u", [1e2, 1e3, 1e4])
    def test_extremes(self, u: float) -> None:
        chosen = torch.tensor([u, -u]).requires_grad_()
        zero = torch.zeros(2)
        loss = dpo_loss(chosen, zero, zero, zero, beta=1.0, reduction="none").loss
        assert loss[0].item() == pytest.approx(math.exp(-u), rel=1e-5)
        assert loss[1].item() == pytest.approx(u, rel=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert gradient[0].item() == pytest.approx(-math.exp(-u), rel=1e-5)
        assert gradient[1].item() == -1

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_rewards_are_detached_and_per_pair(self, reduction: str) -> None:
        w, l = torch.randn(5).requires_grad_(), torch.randn(5).requires_grad_()  # noqa: E741
        result = dpo_loss(w, l, torch.randn(5), torch.randn(5), reduction=reduction)
        assert result.loss.requires_grad
        for value in (result.chosen_rewards, result.rejected_rewards, result.margins, result.accuracies):
            assert value.shape == (5,)
            assert not value.requires_grad

    def test_gradient_reaches_the_reference_too(self) -> None:
        values = [torch.randn(3, dtype=torch.float64).requires_grad_() for _ in range(4)]
        gradients = torch.autograd.grad(dpo_loss(*values).loss, values)
        torch.testing.assert_close(gradients[0], -gradients[2])
        torch.testing.assert_close(gradients[1], -gradients[3])
        torch.testing.assert_close(gradients[0], -gradients[1])

    def test_reference_free_is_a_reference_of_zeros(self) -> None:
        w, l, zero = torch.randn(5), torch.randn(5), torch.zeros(5)  # noqa: E741
        for wanted, got in zip(dpo_loss(w, l, zero, zero), dpo_loss(w, l, reference_free=True), strict=True):
            assert torch.equal(wanted, got)

    def test_float32_policy_and_bfloat16_reference(self) -> None:
        w, l = torch.randn(5), torch.randn(5)  # noqa: E741
        ref = torch.randn(5).bfloat16()
        assert torch.equal(dpo_loss(w, l, ref, ref).loss, dpo_loss(w, l, ref.float(), ref.float()).loss)


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
            assert got[i].item() == pytest.approx(-log_sigmoid(a - b - m) + center * (a + b) ** 2, rel=1e-12)

    def test_margin_carries_no_gradient(self) -> None:
        chosen, margin = torch.randn(3).requires_grad_(), torch.randn(3).requires_grad_()
        pairwise_reward_loss(chosen, torch.randn(3), margin=margin).backward()
        assert chosen.grad is not None
        assert margin.grad is None

    def test_float64_margin_does_not_widen_the_loss(self) -> None:
        x = torch.randn(3)
        assert pairwise_reward_loss(x, -x, margin=torch.ones(3, dtype=torch.float64)).dtype == torch.float32


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


def ranking_oracle(rewards: list[float], ranks: list[int], mask: list[bool]) -> float:
    """The definition, a pair at a time."""
    losses = []
    for i, j in combinations(range(len(rewards)), 2):
        if mask[i] and mask[j] and ranks[i] != ranks[j]:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            losses.append(-log_sigmoid(rewards[better] - rewards[worse]))
    return math.fsum(losses) / len(losses) if losses else 0.0


class TestRanking:
    @pytest.mark.parametrize("answers", [2, 3, 4, 7, 9, 16, 33, 64])
    def test_formula(self, answers: int) -> None:
        rewards = 2 * torch.randn(6, answers, dtype=torch.float64)
        ranks = torch.randint(max(2, answers // 2), (6, answers))
        mask = torch.rand(6, answers) < 0.7
        mask[0] = False
        got = ranking_loss(rewards, ranks, mask=mask, reduction="none")
        for b in range(6):
            wanted = ranking_oracle(rewards[b].tolist(), ranks[b].tolist(), mask[b].tolist())
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

"""The losses of PPO and PPO-ptx against definitions in loops over numbers, and at points worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastpref
from fastpref import nn, ppo_loss, ppo_policy_loss, ppo_value_loss, ptx_loss
from fastpref.integrations import openrlhf
from tests.helpers.losses import fields
from tests.helpers.marks import examples
from tests.helpers.masks import holey, token_batches
from tests.oracles import rlhf as oracles
from tests.tolerance import DTYPES, assert_accurate

close = torch.testing.assert_close


def ppo_policy_loss_of_a_pair(*tensors: Tensor, **mean: Any) -> fastpref.losses.PPOPolicyLoss:
    return ppo_policy_loss(*tensors, clip=(0.1, 0.4), dual_clip=1.3, **mean)


def pair_oracle(*tensors: Tensor, **mean: Any) -> list[float]:
    return oracles.policy_loss(*tensors, clip=(0.1, 0.4), dual_clip=1.3, **mean)


@dataclass(frozen=True)
class Loss:
    """A loss that is a masked mean. Its (B, T) arguments are drawn from normal distributions of the given scales."""

    function: Callable[..., Any]
    oracle: Callable[..., list[float]]
    scales: tuple[float, ...]
    differentiable: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.function.__name__

    def example(self, B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        tensors = (s * torch.randn(B, T, generator=generator, dtype=torch.float64) for s in self.scales)
        return tuple(t.to(dtype) for t in tensors)


LOSSES = (
    Loss(ppo_policy_loss, oracles.policy_loss, (0.3, 0.3, 1.0), (0,)),
    Loss(ppo_policy_loss_of_a_pair, pair_oracle, (0.3, 0.3, 1.0), (0,)),
    Loss(ppo_value_loss, oracles.value_loss, (0.5, 0.5, 1.0), (0,)),
    Loss(ppo_loss, oracles.ppo_loss, (0.3, 0.3, 1.0, 0.5, 0.5, 1.0), (0, 3)),
    Loss(ptx_loss, oracles.ptx_loss, (2.0,), (0,)),
)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
every_reduction = pytest.mark.parametrize("reduction", ["token", "sequence"])


class TestEveryLoss:
    @every_loss
    @every_reduction
    @pytest.mark.parametrize("denominator", [None, 7, 2.5])
    def test_definition(self, loss: Loss, reduction: str, denominator: float | None) -> None:
        tensors, mask = loss.example(5, 9), holey(5, 9)
        got = fields(loss.function(*tensors, mask, reduction=reduction, denominator=denominator))
        wanted = loss.oracle(*tensors, mask, reduction=reduction, denominator=denominator)
        assert [value.item() for value in got] == pytest.approx(wanted, rel=1e-12)
        assert all(value.shape == () for value in got)

    @every_loss
    @every_reduction
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, loss: Loss, dtype: torch.dtype, reduction: str) -> None:
        """A loss is computed in float32 at least, and a gradient has the dtype of its argument."""
        mask, results = holey(4, 33), []
        wide = torch.promote_types(dtype, torch.float32)
        for kind in (dtype, wide, torch.float64):
            leaves = [t.to(kind) for t in loss.example(4, 33, dtype)]
            for i in loss.differentiable:
                leaves[i].requires_grad_()
            result = fields(loss.function(*leaves, mask, reduction=reduction))
            result[0].backward()
            results.append([*result, *(leaves[i].grad for i in loss.differentiable)])
        for i, (ours, eager, truth) in enumerate(zip(*results, strict=True)):
            assert_accurate(ours, eager.to(ours.dtype), truth, f"{loss.name}[{i}]")
        assert results[0][0].dtype == wide

    @every_loss
    @every_reduction
    def test_gradcheck(self, loss: Loss, reduction: str) -> None:
        tensors, mask = loss.example(4, 5), holey(4, 5)
        assert torch.autograd.gradcheck(
            lambda *x: fields(
                loss.function(
                    *(dict(enumerate(tensors)) | dict(zip(loss.differentiable, x, strict=True))).values(),
                    mask,
                    reduction=reduction,
                )
            )[0],
            [tensors[i].requires_grad_() for i in loss.differentiable],
        )

    @every_loss
    def test_only_the_loss_and_only_the_policy_carry_gradients(self, loss: Loss) -> None:
        tensors = [t.requires_grad_() for t in loss.example(3, 4)]
        result = fields(loss.function(*tensors, torch.ones(3, 4, dtype=torch.bool)))
        assert [value.requires_grad for value in result] == [True] + [False] * (len(result) - 1)
        result[0].backward()
        assert [i for i, t in enumerate(tensors) if t.grad is not None] == list(loss.differentiable)

    @every_loss
    @every_reduction
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_masked_is_harmless(self, loss: Loss, reduction: str, value: float) -> None:
        mask, results = holey(4, 6), []
        for harm in (False, True):
            tensors = [t.masked_fill(~mask, value) if harm else t for t in loss.example(4, 6)]
            for i in loss.differentiable:
                tensors[i].requires_grad_()
            result = fields(loss.function(*tensors, mask, reduction=reduction))
            result[0].backward()
            results.append([*result, *(tensors[i].grad for i in loss.differentiable)])
        for clean, harmed in zip(*results, strict=True):
            assert torch.equal(clean, harmed)
        for gradient in results[1][-len(loss.differentiable) :]:
            assert (gradient[~mask] == 0).all()

    @every_loss
    @every_reduction
    @pytest.mark.parametrize("denominator", [None, 0, torch.tensor(0), 3])
    @pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0), (1, 1)])
    def test_nothing_counts(
        self, loss: Loss, shape: tuple[int, int], reduction: str, denominator: Tensor | float | None
    ) -> None:
        leaves = [t.requires_grad_() for t in loss.example(*shape)]
        mask = torch.zeros(shape, dtype=torch.bool)
        result = fields(loss.function(*leaves, mask, reduction=reduction, denominator=denominator))
        assert [value.item() for value in result] == [0] * len(result)
        result[0].backward()
        for i in loss.differentiable:
            assert leaves[i].grad is not None
            assert (leaves[i].grad == 0).all()

    @every_loss
    @pytest.mark.parametrize("kind", ["number", "integer tensor", "float64 tensor"])
    @every_reduction
    def test_parts_with_one_denominator_add_up(self, loss: Loss, reduction: str, kind: str) -> None:
        """Unequal parts of a batch add up to its loss, as in gradient accumulation, where a mean of means would not."""
        tensors, mask = loss.example(6, 8, torch.float32), holey(6, 8)
        count = mask.sum() if reduction == "token" else mask.any(1).sum()
        denominator = {"number": count.item(), "integer tensor": count, "float64 tensor": count.double()}[kind]
        gradients, values = [], []
        for parts in ((slice(0, 6),), (slice(0, 2), slice(2, 6))):
            leaves = [t.clone() for t in tensors]
            for i in loss.differentiable:
                leaves[i].requires_grad_()
            results = [
                fields(loss.function(*(t[p] for t in leaves), mask[p], reduction=reduction, denominator=denominator))
                for p in parts
            ]
            for result in results:
                result[0].backward()
            values.append([sum(x[1:], x[0]) for x in zip(*results, strict=True)])
            gradients.append([leaves[i].grad for i in loss.differentiable])
        plain = fields(loss.function(*tensors, mask, reduction=reduction))
        for whole, summed, alone in zip(*values, plain, strict=True):
            assert whole.dtype == torch.float32
            close(summed, whole, rtol=1e-6, atol=1e-7)
            close(whole, alone, rtol=1e-6, atol=0)
        close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)

    @every_loss
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self, loss: Loss) -> None:
        torch.compiler.reset()
        compiled = torch.compile(loss.function, fullgraph=True, backend="aot_eager")
        mask, results = holey(3, 5), []
        for function in (loss.function, compiled):
            tensors = list(loss.example(3, 5))
            for i in loss.differentiable:
                tensors[i].requires_grad_()
            result = fields(function(*tensors, mask, reduction="sequence", denominator=mask.sum()))
            result[0].backward()
            results.append([*result, *(tensors[i].grad for i in loss.differentiable)])
        close(*results, rtol=1e-14, atol=1e-15)


class TestProperties:
    @examples(60)
    @given(
        batch=token_batches(),
        loss=st.sampled_from(LOSSES),
        reduction=st.sampled_from(["token", "sequence"]),
        denominator=st.sampled_from([None, 3, 0.25]),
        clip=st.sampled_from([0.05, 0.2, 3.0]),
        pair=st.sampled_from([None, (0.05, 0.4), [0.4, 0.05], (0.0, 0.3), (0.3, 0), (1.0, 10.0)]),
        dual_clip=st.sampled_from([None, 1.1, 3]),
    )
    def test_losses(
        self,
        batch: tuple[int, int, Tensor, int],
        loss: Loss,
        reduction: str,
        denominator: float | None,
        clip: float,
        pair: Any,
        dual_clip: float | None,
    ) -> None:
        B, T, mask, seed = batch
        tensors = loss.example(B, T, seed=seed)
        options: dict[str, Any] = {"reduction": reduction, "denominator": denominator}
        if loss.function is ppo_value_loss:
            options["clip"] = clip
        elif loss.function in (ppo_policy_loss, ppo_loss):
            options |= {"clip": pair or clip, "dual_clip": dual_clip}
        got = [value.item() for value in fields(loss.function(*tensors, mask, **options))]
        assert got == pytest.approx(loss.oracle(*tensors, mask, **options), rel=1e-10, abs=1e-13)


class TestPolicyLoss:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope", "clipped"),
        [
            (1.5, 2.0, -2.4, 0.0, 1),  # a good answer made much likelier: no further
            (1.5, -2.0, 3.0, 3.0, 0),  # a bad one made much likelier: back
            (0.5, 2.0, -1.0, -1.0, 0),
            (0.5, -2.0, 1.6, 0.0, 1),
            (1.1, 2.0, -2.2, -2.2, 0),
            (1.0, 2.0, -2.0, -2.0, 0),
            (1.0, 0.0, 0.0, 0.0, 0),
        ],
    )
    def test_by_hand(self, ratio: float, advantage: float, loss: float, slope: float, clipped: int) -> None:
        logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        result = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask)
        assert result.loss.item() == pytest.approx(loss)
        assert result.approx_kl.item() == pytest.approx(math.log(ratio) ** 2 / 2)
        assert result.clip_fraction.item() == clipped
        (gradient,) = torch.autograd.grad(result.loss, logps)
        assert gradient.item() == pytest.approx(slope)

    @pytest.mark.parametrize("advantage", [-1e-3, 0.0, 1e-3, 1.0])
    @pytest.mark.parametrize("log_ratio", [-80.0, -20.0, 20.0, 80.0])
    def test_extremes(self, log_ratio: float, advantage: float) -> None:
        logps = torch.tensor([[log_ratio]]).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        result = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask)
        wanted = oracles.policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask)
        assert [x.item() for x in result] == pytest.approx(wanted, rel=1e-5)
        (gradient,) = torch.autograd.grad(result.loss, logps)
        # The loss is −Aρ or does not depend on the ratio.
        slope = -advantage * math.exp(log_ratio)
        taken = slope >= -advantage * min(max(math.exp(log_ratio), 0.8), 1.2)
        assert gradient.item() == pytest.approx(slope if taken else 0.0, rel=1e-5)

    @pytest.mark.parametrize("advantage", [0.0, 2.0])
    @pytest.mark.parametrize("clip", [0.2, 10.0])
    @pytest.mark.parametrize("log_ratio", [100.0, 1e4, math.inf])
    def test_a_ratio_that_overflows_where_it_is_clipped(self, log_ratio: float, clip: float, advantage: float) -> None:
        logps, mask = torch.tensor([[log_ratio]]).requires_grad_(), torch.ones(1, 1, dtype=torch.bool)
        loss = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip=clip).loss
        assert loss.item() == pytest.approx(-advantage * (1 + clip))
        assert torch.autograd.grad(loss, logps)[0].item() == 0

    @pytest.mark.parametrize("clip", [0.2, (0.0, 0.28), (0.2, 0.0)])
    def test_at_the_old_policy_it_is_the_policy_gradient(self, clip: Any) -> None:
        """A bound may be 0, which is where every ratio is at the start."""
        logps, advantages = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
        mask = torch.ones(3, 4, dtype=torch.bool)
        loss, kl, clipped = ppo_policy_loss(logps, logps.detach(), advantages, mask, clip=clip, dual_clip=3.0)
        (gradient,) = torch.autograd.grad(loss, logps)
        close(gradient, -advantages / 12)
        close(loss, -advantages.mean())
        assert kl.item() == clipped.item() == 0

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope", "clipped"),
        [
            (2.0, 2.0, -2.6, 0.0, 1),  # above 1 + high
            (1.25, 2.0, -2.5, -2.5, 0),  # within, where 1 + low is not
            (0.5, -2.0, 1.8, 0.0, 1),  # below 1 − low
            (0.85, -2.0, 1.8, 0.0, 1),  # as well, where 1 − high is not
            (0.95, -2.0, 1.9, 1.9, 0),
            (2.5, -2.0, 5.0, 5.0, 0),
            (4.0, -2.0, 6.0, 0.0, 0),  # above the dual clip
            (4.0, 2.0, -2.6, 0.0, 1),  # which has no part where A > 0
            (4.0, 0.0, 0.0, 0.0, 0),
        ],
    )
    def test_a_pair_and_a_dual_clip_by_hand(
        self, ratio: float, advantage: float, loss: float, slope: float, clipped: int
    ) -> None:
        logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        result = ppo_policy_loss(
            logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip=(0.1, 0.3), dual_clip=3.0
        )
        assert result.loss.item() == pytest.approx(loss)
        assert result.clip_fraction.item() == clipped
        (gradient,) = torch.autograd.grad(result.loss, logps)
        assert gradient.item() == pytest.approx(slope)

    @pytest.mark.parametrize("dual_clip", [None, 3.0])
    @pytest.mark.parametrize("clip", [(0.1, 0.4), (0.4, 0.1), (1.0, 10.0), (5.0, 0.2), (0.0, 0.3), (0.3, 0.0)])
    def test_against_the_formula(self, clip: tuple[float, float], dual_clip: float | None) -> None:
        """Values and gradients equal those of one clamp of the ratio for each sign of A, in float64."""
        row = LOSSES[0]
        (logps, old, advantages), mask = row.example(40, 30), holey(40, 30)
        logps = (4 * logps).requires_grad_()
        ratio = (logps - old).exp()
        good, bad = ratio.clamp(max=1 + clip[1]), ratio.clamp(min=1 - clip[0], max=dual_clip)
        losses = -advantages * torch.where(advantages > 0, good, bad)
        wanted = losses[mask].mean()
        result = ppo_policy_loss(logps, old, advantages, mask, clip=clip, dual_clip=dual_clip)
        close(result.loss, wanted, rtol=1e-13, atol=1e-13)
        close(torch.autograd.grad(result.loss, logps), torch.autograd.grad(wanted, logps), rtol=1e-13, atol=1e-16)
        outside = torch.where(advantages > 0, ratio > 1 + clip[1], ratio < 1 - clip[0])[mask]
        close(result.clip_fraction, outside.double().mean())
        assert outside.any()

    def test_each_bound_is_of_one_sign_alone(self) -> None:
        """For large log-ratios, `high` changes the loss where A > 0, and `low` and the dual clip where A < 0."""
        logps, old = torch.tensor([[-3.0], [3.0]]), torch.zeros(2, 1)
        mask = torch.ones(2, 1, dtype=torch.bool)

        def loss(sign: int, **options: Any) -> float:
            return ppo_policy_loss(logps, old, torch.full((2, 1), float(sign)), mask, **options).loss.item()

        assert loss(1, clip=(0.2, 0.2)) == loss(1, clip=(0.4, 0.2)) == loss(1, clip=(0.4, 0.2), dual_clip=2.0)
        assert loss(1, clip=(0.2, 0.2)) > loss(1, clip=(0.2, 0.4))
        assert loss(-1, clip=(0.2, 0.2)) == loss(-1, clip=(0.2, 0.4))
        assert loss(-1, clip=(0.2, 0.2)) > loss(-1, clip=(0.4, 0.2)) > loss(-1, clip=(0.4, 0.2), dual_clip=2.0)

    @pytest.mark.parametrize("pair", [(0.3, 0.3), [0.3, 0.3]])
    def test_a_pair_of_one_number_is_the_number(self, pair: Any) -> None:
        row = LOSSES[0]
        tensors, mask = row.example(4, 6), holey(4, 6)
        assert ppo_policy_loss(*tensors, mask, clip=pair) == ppo_policy_loss(*tensors, mask, clip=0.3)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "share"),
        [(0.5, -1.0, 1.0), (0.5, 1.0, 1.0), (1.5, 1.0, 1.0), (1.5, -1.0, 1.0), (3.0, -1.0, 1.0), (3.0, 1.0, 0.0)],
    )
    def test_gradients_at_ties(self, ratio: float, advantage: float, share: float) -> None:
        """At a bound that enters the loss, the slope is that of −Aρ."""
        logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64).requires_grad_()
        ratio = logps.exp().item()
        clip = (1 - ratio if ratio < 1 else 0.2, ratio - 1 if 1 < ratio < 2 else 0.2)
        loss = ppo_policy_loss(
            logps,
            torch.zeros(1, 1),
            torch.tensor([[advantage]]),
            torch.ones(1, 1, dtype=torch.bool),
            clip=clip,
            dual_clip=ratio if ratio > 2 else 3.0,
        ).loss
        assert torch.autograd.grad(loss, logps)[0].item() == pytest.approx(-advantage * ratio * share)

    @pytest.mark.parametrize("clip", [0.2, (0.2, 10.0)])
    @pytest.mark.parametrize("log_ratio", [100.0, 1e4, math.inf])
    def test_a_ratio_that_overflows_where_the_dual_clip_holds_it(self, log_ratio: float, clip: Any) -> None:
        logps, mask = torch.tensor([[log_ratio]]).requires_grad_(), torch.ones(1, 1, dtype=torch.bool)
        result = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[-2.0]]), mask, clip=clip, dual_clip=3)
        assert result.loss.item() == 6
        assert result.clip_fraction.item() == 0
        assert torch.autograd.grad(result.loss, logps)[0].item() == 0

    @pytest.mark.parametrize("clip", [1e30, (1e30, 1e30), (0.2, 1e30)])
    def test_the_largest_clip_clips_nothing(self, clip: Any) -> None:
        logps, mask = torch.tensor([[60.0, 0.5]]).requires_grad_(), torch.ones(1, 2, dtype=torch.bool)
        result = ppo_policy_loss(logps, torch.zeros(1, 2), torch.ones(1, 2), mask, clip=clip, dual_clip=1e29)
        assert result.loss.item() == pytest.approx(-math.exp(60) / 2, rel=1e-5)
        assert result.clip_fraction == 0
        assert torch.autograd.grad(result.loss, logps)[0].isfinite().all()

    @every_reduction
    @pytest.mark.parametrize("options", [{"clip": (0.1, 0.4)}, {"clip": [0.4, 0.1], "dual_clip": 1.3}], ids=str)
    def test_function_module_and_adapter_are_one(self, options: dict[str, Any], reduction: str) -> None:
        (logps, old, advantages), mask = LOSSES[0].example(6, 8), holey(6, 8)
        logps.requires_grad_()
        low, high = options["clip"]
        wanted = ppo_policy_loss(logps, old, advantages, mask, reduction=reduction, **options)
        (gradient,) = torch.autograd.grad(wanted.loss, logps)
        clipped = ppo_policy_loss(logps, old, advantages, mask, **options).clip_fraction
        adapter = openrlhf.PolicyLoss(low, high, options.get("dual_clip"), token_level_loss=reduction == "token")
        for loss_fn in (nn.PPOPolicyLoss(**options, reduction=reduction), adapter):
            loss, reported, *_ = loss_fn(logps, old, advantages, mask)
            assert loss == wanted.loss
            assert reported == clipped
            assert torch.equal(torch.autograd.grad(loss, logps)[0], gradient)
        total = mask.sum() if reduction == "token" else mask.any(1).sum()
        totals = {"batch_num_tokens": total, "global_batch_size": total}
        close(
            nn.PPOPolicyLoss(**options, reduction=reduction)(logps, old, advantages, mask, **totals).loss, wanted.loss
        )

    def test_the_module_shows_its_clips(self) -> None:
        wanted = "PPOPolicyLoss(clip=(0.2, 0.28), dual_clip=3.0)"
        assert repr(nn.PPOPolicyLoss(clip=(0.2, 0.28), dual_clip=3.0)) == wanted

    @pytest.mark.parametrize("dual_clip", [None, 3.0])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_nan_that_counts_is_seen(self, place: int, dual_clip: float | None) -> None:
        tensors = list(torch.zeros(3, 1, 2))
        tensors[place][0, 1] = math.nan
        mask = torch.ones(1, 2, dtype=torch.bool)
        assert ppo_policy_loss(*tensors, mask, dual_clip=dual_clip).loss.isnan()


class TestValueLoss:
    @pytest.mark.parametrize(
        ("value", "old", "target", "loss", "slope", "clipped"),
        [
            (1.0, 0.0, 2.0, 1.62, 0.0, 1),  # moved towards the target by more than 0.2: (0.2 − 2)²/2, no further
            (1.0, 0.0, -1.0, 2.0, 2.0, 0),  # and away from it
            (0.1, 0.0, 1.0, 0.405, -0.9, 0),
            (-0.5, 0.0, -2.0, 1.62, 0.0, 1),
        ],
    )
    def test_by_hand(self, value: float, old: float, target: float, loss: float, slope: float, clipped: int) -> None:
        values = torch.tensor([[value]], dtype=torch.float64).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        result = ppo_value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]), mask)
        assert result.loss.item() == pytest.approx(loss)
        assert result.clip_fraction.item() == clipped
        assert torch.autograd.grad(result.loss, values)[0].item() == pytest.approx(slope)

    @pytest.mark.parametrize("value", [0.25, -0.25])
    @pytest.mark.parametrize("target", [1.0, -1.0, 0.25])
    def test_gradients_at_ties(self, value: float, target: float) -> None:
        """At a bound the slope is that of (v − R)²."""
        values, mask = torch.tensor([[value]]).requires_grad_(), torch.ones(1, 1, dtype=torch.bool)
        loss = ppo_value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), mask, clip=0.25).loss
        assert torch.autograd.grad(loss, values)[0].item() == value - target

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_nan_that_counts_is_seen(self, place: int) -> None:
        tensors = list(torch.zeros(3, 1, 2))
        tensors[place][0, 1] = math.nan
        assert ppo_value_loss(*tensors, torch.ones(1, 2, dtype=torch.bool)).loss.isnan()


class TestPpoLoss:
    def test_is_its_parts(self) -> None:
        row = next(loss for loss in LOSSES if loss.function is ppo_loss)
        tensors, mask = row.example(4, 6), holey(4, 6)
        options: dict[str, Any] = {"reduction": "sequence", "denominator": 3}
        clips: dict[str, Any] = {"clip": (0.1, 0.3), "dual_clip": 1.5}
        result = ppo_loss(*tensors, mask, **clips, value_clip=0.4, value_coef=0.7, **options)
        policy = ppo_policy_loss(*tensors[:3], mask, **clips, **options)
        value = ppo_value_loss(*tensors[3:], mask, clip=0.4, **options)
        assert result.loss == policy.loss + 0.7 * value.loss
        assert result[1:] == (policy.loss, value.loss, policy.approx_kl, policy.clip_fraction)

    def test_by_hand(self) -> None:
        one = torch.ones(1, 1)
        logps = torch.full((1, 1), math.log(1.5))
        result = ppo_loss(logps, 0 * one, 2 * one, one, 0 * one, 2 * one, one.bool())
        assert [x.item() for x in result] == pytest.approx([-2.4 + 0.162, -2.4, 1.62, math.log(1.5) ** 2 / 2, 1])


class TestPtx:
    def test_by_hand(self) -> None:
        """Sequences of one and two tokens that count, and one token that does not."""
        logps = torch.tensor([[math.log(0.5), math.nan], [math.log(0.5), math.log(0.125)]])
        mask = torch.tensor([[True, False], [True, True]])
        assert ptx_loss(logps, mask, gamma=3.0).item() == pytest.approx(5 * math.log(2))
        assert ptx_loss(logps, mask, gamma=3.0, reduction="sequence").item() == pytest.approx(4.5 * math.log(2))
        assert ptx_loss(logps, mask).item() == pytest.approx(27.8 * 5 / 3 * math.log(2))
        assert ptx_loss(logps, mask, gamma=3.0, denominator=5).item() == pytest.approx(3 * math.log(2))

    def test_of_our_log_probs(self) -> None:
        logits, labels = torch.zeros(2, 5, 4, requires_grad=True), torch.randint(4, (2, 5))
        labels[0, 3:] = -100
        logps = fastpref.token_logprobs(logits, labels)
        ptx_loss(logps, labels[:, 1:] != -100, gamma=1.0).backward()
        assert logits.grad is not None
        # ∂(−logp)/∂z of the label is ¼ − 1, over 6 tokens.
        assert logits.grad[1, 0, labels[1, 1]].item() == pytest.approx(-0.75 / 6)
        assert (logits.grad[0, 2:] == 0).all()

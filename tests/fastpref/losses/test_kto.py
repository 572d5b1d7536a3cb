"""`kto_loss` against its definition in 50 digits, at points worked out by hand and at extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import kto_loss
from tests.helpers.dpo import LOG3, example
from tests.helpers.marks import wide_dtypes
from tests.oracles.precision import Numbers, derivative, mp, numbers
from tests.oracles.preference import kto_losses


class TestKto:
    @wide_dtypes
    @pytest.mark.parametrize("kl", [0.0, 1.25, -3.0, torch.tensor(0.5), torch.tensor([1.0, -0.5, 2.0])])
    @pytest.mark.parametrize("options", [{}, {"beta": 0.5, "desirable_weight": 1.33, "undesirable_weight": 0.25}])
    def test_formula(self, kl: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
        (policy, _, ref, _), _ = example(6, dtype=dtype)
        good = torch.tensor([True, False, True, True, False, False])
        leaf, eps = policy.clone().requires_grad_(), torch.finfo(dtype).eps
        kl = kl.to(dtype) if isinstance(kl, Tensor) else kl
        result = kto_loss(leaf, ref, good, kl=kl, reduction="none", **options)
        z = mp.mpf(kl.mean().item() if isinstance(kl, Tensor) else kl)
        weights = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, **options}

        def right(p: Numbers) -> Numbers:
            return kto_losses(p, numbers(ref), good.tolist(), kl=z, **weights)

        exact, beta = numbers(policy), weights["beta"]
        for got, wanted in zip(result.loss.tolist(), right(exact), strict=True):
            assert abs(got - wanted) <= 8 * eps * (1 + beta * 60)
        (slope,) = torch.autograd.grad(result.loss.sum(), leaf)
        for got, wanted in zip(slope.tolist(), derivative(lambda p: sum(right(p)), exact), strict=True):
            assert abs(got - wanted) <= 8 * eps * beta * (1 + beta * 60)
        torch.testing.assert_close(result.rewards, beta * (policy - ref))
        assert not result.rewards.requires_grad
        mean = kto_loss(policy, ref, good, kl=kl, **options).loss
        torch.testing.assert_close(mean, result.loss.detach().sum() / 6)
        torch.testing.assert_close(kto_loss(policy, ref, good, kl=kl, reduction="sum", **options).loss, mean * 6)

    def test_by_hand(self) -> None:
        policy = torch.tensor([LOG3, LOG3, 0.0, 0.0], dtype=torch.float64)
        good = torch.tensor([True, False, True, False])
        zero = torch.zeros(4, dtype=torch.float64)
        got = kto_loss(policy, zero, good, kl=0.0, beta=1.0, undesirable_weight=2.0, reduction="none")
        assert got.loss.tolist() == pytest.approx([0.25, 1.5, 0.5, 1.0])
        assert got.rewards.tolist() == pytest.approx([LOG3, LOG3, 0, 0])
        got = kto_loss(policy, zero, good, kl=LOG3, beta=1.0, reduction="none")
        assert got.loss.tolist() == pytest.approx([0.5, 0.5, 0.75, 0.25])

    def test_the_baseline_is_one_number_without_a_gradient(self) -> None:
        (policy, _, ref, _), _ = example(4)
        good = torch.tensor([True, False, True, False])
        kl = torch.tensor([3.0, -1.0, 1.0], dtype=torch.float64).requires_grad_()
        leaf = policy.clone().requires_grad_()
        loss = kto_loss(leaf, ref, good, kl=kl).loss
        assert torch.equal(loss.detach(), kto_loss(policy, ref, good, kl=1.0).loss)
        loss.backward()
        assert kl.grad is None
        assert leaf.grad is not None
        assert (leaf.grad != 0).all()

    def test_the_baseline_is_not_below_zero(self) -> None:
        (policy, _, ref, _), _ = example(4)
        good = torch.tensor([True, False, True, False])
        at_zero = kto_loss(policy, ref, good, kl=0.0).loss
        for kl in (-5.0, torch.tensor([-5.0, 1.0]).double(), torch.zeros(0, dtype=torch.float64)):
            assert torch.equal(kto_loss(policy, ref, good, kl=kl).loss, at_zero)
        # The mean is taken first: the parts below zero count.
        mixed = torch.tensor([-1.0, 3.0], dtype=torch.float64)
        assert torch.equal(kto_loss(policy, ref, good, kl=mixed).loss, kto_loss(policy, ref, good, kl=1.0).loss)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_empty(self, reduction: str) -> None:
        leaf = torch.zeros(0).requires_grad_()
        result = kto_loss(leaf, torch.zeros(0), torch.zeros(0, dtype=torch.bool), kl=0.5, reduction=reduction)
        assert result.loss.shape == ((0,) if reduction == "none" else ())
        assert result.loss.sum().item() == 0
        assert result.rewards.shape == (0,)
        assert torch.autograd.grad(result.loss.sum(), leaf)[0].shape == (0,)

    @pytest.mark.parametrize("good", [True, False])
    def test_one_kind_alone(self, good: bool) -> None:
        (policy, _, ref, _), _ = example(3)
        loss = kto_loss(policy, ref, torch.full((3,), good), kl=0.25, beta=1.0).loss
        x = (policy - ref - 0.25) * (-1 if good else 1)
        torch.testing.assert_close(loss, x.sigmoid().mean())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        (policy, _, ref, _), _ = example(5, dtype=dtype)
        good = torch.tensor([True, False, True, False, True])
        got = kto_loss(policy, ref, good, kl=0.5)
        wide = kto_loss(policy.float(), ref.float(), good, kl=0.5)
        assert got.loss.dtype == got.rewards.dtype == torch.float32
        assert torch.equal(got.loss, wide.loss)
        assert torch.equal(got.rewards, wide.rewards)

    @pytest.mark.parametrize("u", [1e2, 1e3, 1e4])
    def test_extremes(self, u: float) -> None:
        leaf = torch.tensor([u, -u, u, -u]).requires_grad_()
        good = torch.tensor([True, True, False, False])
        loss = kto_loss(leaf, torch.zeros(4), good, kl=0.0, beta=1.0, reduction="none").loss
        assert loss.tolist() == pytest.approx([0, 1, 1, 0], abs=1e-6)
        assert torch.autograd.grad(loss.sum(), leaf)[0].tolist() == pytest.approx([0] * 4, abs=1e-6)

    def test_gradcheck(self) -> None:
        (policy, _, ref, _), _ = example(5)
        good = torch.tensor([True, False, True, False, True])
        leaves = [policy.requires_grad_(), ref.requires_grad_()]
        for reduction in ("mean", "none"):
            options = {"kl": 0.3, "beta": 0.4, "desirable_weight": 2.0, "reduction": reduction}
            assert torch.autograd.gradcheck(lambda p, r, o=options: kto_loss(p, r, good, **o).loss, leaves)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_traces_whole(self) -> None:
        torch.compiler.reset()
        (policy, _, ref, _), _ = example(5)
        good, kl = torch.tensor([True, False, True, False, True]), torch.tensor([0.5, 1.0], dtype=torch.float64)
        compiled = torch.compile(kto_loss, fullgraph=True, backend="aot_eager")
        wanted, got = kto_loss(policy, ref, good, kl=kl), compiled(policy, ref, good, kl=kl)
        torch.testing.assert_close(tuple(got), tuple(wanted), rtol=1e-13, atol=1e-14)

    def test_refusals(self) -> None:
        x, good = torch.zeros(2), torch.tensor([True, False])
        with pytest.raises(TypeError, match=r"desirable must .*bool.*int64"):
            kto_loss(x, x, good.long(), kl=0.0)
        with pytest.raises(ValueError, match=r"desirable must .*2.*3"):
            kto_loss(x, x, torch.ones(3, dtype=torch.bool), kl=0.0)
        with pytest.raises(ValueError, match=r"ref_logps must .*2.*3"):
            kto_loss(x, torch.zeros(3), good, kl=0.0)
        with pytest.raises(ValueError, match=r"beta must .*-1"):
            kto_loss(x, x, good, kl=0.0, beta=-1.0)
        with pytest.raises(ValueError, match=r"reduction must .*'batchmean'"):
            kto_loss(x, x, good, kl=0.0, reduction="batchmean")

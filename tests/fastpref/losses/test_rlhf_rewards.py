"""PPO's shaped rewards, whitened advantages, and the controller of the KL penalty."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import AdaptiveKLController, kl_shaped_rewards, masked_whiten
from tests.helpers.marks import examples
from tests.helpers.masks import holey, token_batches
from tests.oracles import rlhf as oracles
from tests.tolerance import DTYPES

close = torch.testing.assert_close


class TestProperties:
    @examples(60)
    @given(batch=token_batches(), estimator=st.sampled_from(["k1", "k2", "k3"]), coef=st.sampled_from([0.0, 0.1, 2.0]))
    def test_shaped_rewards(self, batch: tuple[int, int, Tensor, int], estimator: str, coef: float) -> None:
        B, T, mask, seed = batch
        generator = torch.Generator().manual_seed(seed)
        scores, (logps, ref) = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B,), (2, B, T))
        )
        got = kl_shaped_rewards(scores, logps, ref, mask, kl_coef=coef, estimator=estimator)
        close(got, oracles.kl_shaped_rewards(scores, logps, ref, mask, coef, estimator), rtol=1e-12, atol=1e-12)

    @examples(60)
    @given(batch=token_batches(), shift=st.booleans(), offset=st.sampled_from([0.0, 10.0]))
    def test_whitening(self, batch: tuple[int, int, Tensor, int], shift: bool, offset: float) -> None:
        B, T, mask, seed = batch
        x = offset + torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        # A single value has a variance of 0, and what its mean is off by is divided by 1e-4.
        close(masked_whiten(x, mask, shift_mean=shift), oracles.masked_whiten(x, mask, shift), rtol=1e-6, atol=1e-10)


class TestShapedRewards:
    @pytest.mark.parametrize(
        ("estimator", "penalties"),
        [("k1", [1.0, -2.0]), ("k2", [0.5, 2.0]), ("k3", [math.exp(-1), math.exp(2) - 3])],
    )
    def test_by_hand(self, estimator: str, penalties: list[float]) -> None:
        scores, logps = torch.tensor([10.0, 7.0]), torch.tensor([[0.0, math.nan, -3.0, math.nan], [math.nan] * 4])
        ref = torch.tensor([[-1.0, 0.0, -1.0, 0.0]] * 2)
        mask = torch.tensor([[True, False, True, False], [False] * 4])
        got = kl_shaped_rewards(scores, logps, ref, mask, kl_coef=0.1, estimator=estimator)
        assert got[0].tolist() == pytest.approx([-0.1 * penalties[0], 0, 10 - 0.1 * penalties[1], 0])
        assert got[1].tolist() == [0] * 4

    def test_a_score_where_nothing_counts_is_never_read(self) -> None:
        x, mask = torch.zeros(2, 3), torch.tensor([[False] * 3, [True] * 3])
        got = kl_shaped_rewards(torch.tensor([math.nan, 1.0]), x, x, mask, kl_coef=1.0)
        assert got.tolist() == [[0, 0, 0], [0, 0, 1]]

    def test_k3_keeps_its_digits_and_is_never_below_zero(self) -> None:
        d = torch.tensor([[1e-3, -1e-3, 1e-2, 80.0, -80.0]])
        got = kl_shaped_rewards(
            torch.zeros(1), d, torch.zeros_like(d), torch.ones_like(d).bool(), kl_coef=1.0, estimator="k3"
        )
        wanted = [math.expm1(-x) + x for x in d.double()[0].tolist()]
        assert (-got[0]).tolist() == pytest.approx(wanted, rel=2e-4)
        assert (got <= 0).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes_and_detached(self, dtype: torch.dtype) -> None:
        """Log-probs are widened before their difference, which bf16 would round to 8 bits."""
        logps, ref = (torch.randn(3, 5) - 50).to(dtype).requires_grad_(), (torch.randn(3, 5) - 50).to(dtype)
        scores, mask = torch.randn(3).to(dtype).requires_grad_(), holey(3, 5)
        wide = torch.promote_types(dtype, torch.float32)
        got = kl_shaped_rewards(scores, logps, ref, mask, kl_coef=0.1)
        assert got.dtype == wide
        assert not got.requires_grad
        assert torch.equal(got, kl_shaped_rewards(scores.to(wide), logps.to(wide), ref.to(wide), mask, kl_coef=0.1))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self) -> None:
        torch.compiler.reset()
        compiled = torch.compile(kl_shaped_rewards, fullgraph=True, backend="aot_eager")
        arguments = (torch.randn(3), *torch.randn(2, 3, 5), holey(3, 5))
        for estimator in ("k1", "k3"):
            options = {"kl_coef": 0.1, "estimator": estimator}
            close(compiled(*arguments, **options), kl_shaped_rewards(*arguments, **options))


class TestWhiten:
    def test_by_hand(self) -> None:
        """1 and 3: μ = 2, σ = 1, with the count as the variance's divisor."""
        x = torch.tensor([[1.0, math.nan], [3.0, math.inf]], dtype=torch.float64)
        mask = torch.tensor([[True, False], [True, False]])
        assert masked_whiten(x, mask).tolist() == [pytest.approx([-1, 0], abs=1e-8), pytest.approx([1, 0], abs=1e-8)]
        assert masked_whiten(x, mask, shift_mean=False).tolist() == [pytest.approx([1, 0]), pytest.approx([3, 0])]

    @pytest.mark.parametrize("shift", [True, False])
    def test_gradcheck(self, shift: bool) -> None:
        x, mask = torch.randn(3, 4, dtype=torch.float64).requires_grad_(), holey(3, 4, 0.9, seed=3)
        assert mask.sum() > 3
        assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask, shift_mean=shift), x)

    def test_what_is_masked_reaches_no_gradient(self) -> None:
        mask = holey(3, 4, 0.9, seed=3)
        x = torch.randn(3, 4).masked_fill(~mask, math.nan).requires_grad_()
        (masked_whiten(x, mask, shift_mean=False) ** 3).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[~mask] == 0).all()

    @pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3), ()])
    def test_nothing_counts(self, shape: tuple[int, ...]) -> None:
        x = torch.randn(shape).requires_grad_()
        got = masked_whiten(x, torch.zeros(shape, dtype=torch.bool), shift_mean=False)
        assert got.shape == shape
        assert (got == 0).all()
        got.sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()

    def test_one_value_is_its_own_mean(self) -> None:
        mask = torch.tensor([False, True])
        assert masked_whiten(torch.tensor([5.0, 7.0]), mask).tolist() == [0, 0]
        assert masked_whiten(torch.tensor([5.0, 7.0]), mask, shift_mean=False).tolist() == [0, 7]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        x, mask = (100 + torch.randn(4, 50)).to(dtype), holey(4, 50)
        got = masked_whiten(x, mask)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        close(got.double(), oracles.masked_whiten(x.double(), mask), rtol=1e-4, atol=1e-4)


class TestController:
    @pytest.mark.parametrize(
        ("kl", "change"),
        [(6.0, 0.0), (6.6, 0.01), (5.4, -0.01), (100.0, 0.02), (0.0, -0.02), (math.inf, 0.02), (-5.0, -0.02)],
    )
    def test_by_hand(self, kl: float, change: float) -> None:
        """Target 6, 100 samples of a horizon of 1000: a tenth of the error, which is cut at a fifth."""
        controller = AdaptiveKLController(0.2, 6.0, 1000)
        controller.update(kl, 100)
        assert controller.value == pytest.approx(0.2 * (1 + change))
        controller.update(torch.tensor(kl), 0)
        assert controller.value == pytest.approx(0.2 * (1 + change))

    def test_steers_to_its_target(self) -> None:
        """The coefficient of a policy whose KL divergence is 1/c reaches the target."""
        controller = AdaptiveKLController(0.5, 4.0, 1000)
        for _ in range(2000):
            controller.update(1 / controller.value, 64)
        assert controller.value == pytest.approx(0.25, rel=1e-3)

    def test_a_kl_beyond_a_floats_range_moves_it_as_far_as_any(self) -> None:
        controller = AdaptiveKLController(0.1, 6.0, 100)
        controller.update(10**400, 50)
        assert controller.value == pytest.approx(0.1 * (1 + 0.2 * 50 / 100))

    def test_refusals(self) -> None:
        for wrong in ((0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.nan)):
            with pytest.raises(ValueError, match=r"(init|target|horizon) must be .*above 0.*(0\.0|-1\.0|nan)"):
                AdaptiveKLController(*wrong)
        controller = AdaptiveKLController(0.2, 6.0, 1000)
        with pytest.raises(ValueError, match=r"kl must be .*nan"):
            controller.update(math.nan, 1)
        with pytest.raises(ValueError, match=r"n must be .*-1"):
            controller.update(1.0, -1)
        assert controller.value == 0.2

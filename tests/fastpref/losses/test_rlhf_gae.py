"""Generalised advantage estimation: the sums over the tokens that count, its edges, and what it compiles to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import gae, masked_whiten, reference
from fastpref_kernels.eager import gae as scan
from tests.helpers.marks import examples
from tests.helpers.masks import holey, ragged, token_batches
from tests.oracles import rlhf as oracles
from tests.tolerance import DTYPES, assert_accurate

close = torch.testing.assert_close


class TestProperties:
    @examples(60)
    @given(
        batch=token_batches(),
        gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
        lam=st.sampled_from([0.0, 0.95, 1.0]),
        block=st.sampled_from([2, 8, 32]),
        chunk=st.sampled_from([1, 50, 1 << 17]),
    )
    def test_gae(
        self,
        batch: tuple[int, int, Tensor, int],
        gamma: float,
        lam: float,
        block: int,
        chunk: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Small blocks nest deeply, and small chunks are many."""
        B, T, mask, seed = batch
        monkeypatch.setattr(scan, "BLOCK", block)
        monkeypatch.setattr(scan, "CHUNK_TOKENS", chunk)
        scan._powers.cache_clear()
        rewards, values = torch.randn(2, B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wanted = oracles.gae(rewards, values, mask, gamma, lam)
        for function in (gae, reference.gae):
            close(function(rewards, values, mask, gamma=gamma, lam=lam), wanted, rtol=1e-11, atol=1e-11)
        scan._powers.cache_clear()


class TestGae:
    def test_by_hand(self) -> None:
        """γ = λ = ½ and V is 0 beyond the end. The hole is skipped, and its values are never read."""
        rewards = torch.tensor([[1.0, 2.0, math.nan, 4.0, math.nan]])
        values = torch.tensor([[2.0, 4.0, math.nan, 8.0, math.nan]])
        mask = torch.tensor([[True, True, False, True, False]])
        advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
        # δ = (1 + 2 − 2, 2 + 4 − 4, ·, 4 + 0 − 8), A = δ + A_next/4.
        assert advantages.tolist() == [[1.25, 1.0, 0, -4.0, 0]]
        assert returns.tolist() == [[3.25, 5.0, 0, 4.0, 0]]

    @pytest.mark.parametrize("lam", [0.0, 1.0])
    def test_its_two_ends(self, lam: float) -> None:
        """λ = 1 gives the discounted sum of rewards less the value, and λ = 0 the one-step error."""
        rewards, values = torch.randn(2, 3, 70, dtype=torch.float64)
        advantages, returns = gae(rewards, values, torch.ones(3, 70, dtype=torch.bool), gamma=0.9, lam=lam)
        if lam:
            total = sum(0.9**t * rewards[:, t] for t in range(70))
            close(returns[:, 0], total)
        else:
            close(advantages[:, :-1], rewards[:, :-1] + 0.9 * values[:, 1:] - values[:, :-1])

    @pytest.mark.parametrize("holes", [False, True])
    @pytest.mark.parametrize("T", [1, 31, 33, 300, 2048])
    @pytest.mark.parametrize("decay", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.3, 0.3), (0.0, 0.5), (1.0, 0.0)])
    def test_as_exact_as_the_loop(self, decay: tuple[float, float], T: int, holes: bool) -> None:
        gamma, lam = decay
        rewards, values = torch.randn(2, 16, T)
        mask = holey(16, T) if holes else ragged(16, T)
        options = {"gamma": gamma, "lam": lam}
        ours, eager = gae(rewards, values, mask, **options), reference.gae(rewards, values, mask, **options)
        truth = reference.gae(rewards.double(), values.double(), mask, **options)
        for name, *found in zip(("advantages", "returns"), ours, eager, truth, strict=True):
            assert_accurate(*found, name)

    def test_a_very_long_sequence(self) -> None:
        """Three levels of blocks count undiscounted rewards of 1 exactly, as float32 can up to 2²⁴."""
        T = 40_000
        rewards, values = torch.ones(1, T), torch.zeros(1, T)
        advantages, _ = gae(rewards, values, torch.ones(1, T, dtype=torch.bool), gamma=1.0, lam=1.0)
        assert torch.equal(advantages[0], torch.arange(T, 0, -1).float())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        rewards, values = torch.randn(2, 3, 40).to(dtype)
        mask = holey(3, 40)
        wide = torch.promote_types(dtype, torch.float32)
        for got, wanted in zip(gae(rewards, values, mask), gae(rewards.to(wide), values.to(wide), mask), strict=True):
            assert got.dtype == wide
            assert torch.equal(got, wanted)
        assert gae(rewards, values.double(), mask)[0].dtype == torch.float64

    def test_tiny_decays_are_not_slowed_by_denormals(self) -> None:
        powers = scan._powers(1e-3, torch.float32, torch.device("cpu"))
        assert ((powers == 0) | (powers >= torch.finfo(torch.float32).tiny)).all()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("function", [gae, reference.gae])
    def test_what_is_masked_is_harmless(self, function: Callable[..., Any], value: float) -> None:
        rewards, values = torch.randn(2, 6, 70)
        for mask in (holey(6, 70), ragged(6, 70)):
            clean = function(rewards, values, mask)
            harmed = function(rewards.masked_fill(~mask, value), values.masked_fill(~mask, value), mask)
            for a, b in zip(clean, harmed, strict=True):
                assert torch.equal(a, b)
                assert (b[~mask] == 0).all()

    @pytest.mark.parametrize("holes", [False, True])
    def test_a_nan_that_counts_is_its_own_sequences(self, holes: bool) -> None:
        rewards, values = torch.randn(2, 5, 70)
        mask = holey(5, 70) if holes else ragged(5, 70)
        mask[2, :50] = True
        clean = gae(rewards, values, mask)
        rewards[2, 40] = math.nan
        for before, after in zip(clean, gae(rewards, values, mask), strict=True):
            assert after[2, :41].isnan().all()
            assert (after[2][~mask[2]] == 0).all()
            others = [0, 1, 3, 4]
            assert torch.equal(before[others], after[others])

    @pytest.mark.parametrize("T", [1, 20, 70, 2100])
    def test_bits_depend_on_no_other_sequence(self, T: int) -> None:
        rewards, values = torch.randn(2, 7, T)
        mask = ragged(7, T)
        mask[3, T // 8] = False
        whole = gae(rewards, values, mask)
        for part in (slice(0, 1), slice(2, 3), slice(4, 7)):
            for a, b in zip(whole, gae(rewards[part], values[part], mask[part]), strict=True):
                assert torch.equal(a[part], b)

    @pytest.mark.parametrize("function", [gae, reference.gae])
    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
    def test_empty(self, function: Callable[..., Any], shape: tuple[int, int]) -> None:
        zeros = torch.zeros(shape)
        for counts in (False, True):
            for got in function(zeros, zeros, torch.full(shape, counts)):
                assert got.shape == shape
                assert (got == 0).all()

    @pytest.mark.parametrize("function", [gae, reference.gae])
    def test_detached(self, function: Callable[..., Any]) -> None:
        rewards, values = (torch.randn(2, 3).requires_grad_() for _ in range(2))
        for got in function(rewards, values, torch.ones(2, 3, dtype=torch.bool)):
            assert not got.requires_grad

    def test_strides_and_untouched_inputs(self) -> None:
        rewards, values = torch.randn(2, 70, 4).transpose(1, 2)
        mask = holey(70, 4).T
        kept = [x.clone() for x in (rewards, values, mask)]
        got = gae(rewards, values, mask)
        wanted = gae(*(x.contiguous() for x in kept))
        assert all(map(torch.equal, got, wanted))
        assert all(map(torch.equal, (rewards, values, mask), kept))
        row = torch.randn(1, 70)
        expanded = gae(row.expand(3, 70), row.expand(3, 70), ragged(1, 70).expand(3, 70))
        assert all(torch.equal(x[0], x[2]) for x in expanded)

    def test_operator(self) -> None:
        rewards, values = torch.randn(2, 3, 40)
        for mask in (ragged(3, 40), holey(3, 40)):
            torch.library.opcheck(torch.ops.fastpref.gae, (rewards, values.bfloat16(), mask, 0.9, 0.95))

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self, dynamic: bool) -> None:
        torch.compiler.reset()

        def advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
            return masked_whiten(gae(rewards, values * 2, mask, lam=0.9)[0], mask)

        compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for T in (40, 70):
            arguments = (*torch.randn(2, 3, T, dtype=torch.float64), holey(3, T))
            close(compiled(*arguments), advantages(*arguments), rtol=1e-12, atol=1e-14)

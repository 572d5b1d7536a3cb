"""The advantages' kernel against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref import reference
from fastpref_kernels.triton import gae, launches
from tests.helpers.masks import holey, ragged
from tests.oracles.rlhf import gae as gae_oracle
from tests.tolerance import DTYPES, assert_accurate
from tests.triton.launched.conftest import travelling

Kernel = Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
kernel: Kernel = travelling(gae.gae)
BLOCK = launches.SMALL["gae"].block


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launches.SMALL, "gae", launches.Launch(32, 4))


@settings(
    max_examples=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    B=st.integers(1, 3), T=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 96, 130])),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]), gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_definition(B: int, T: int, share: float, gamma: float, lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=generator, dtype=torch.float64)
    mask = holey(B, T, share, seed)
    got, wanted = (function(rewards, values, mask, gamma, lam) for function in (kernel, gae_oracle))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("decay", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.3, 0.3), (0.0, 0.5)])
@pytest.mark.parametrize(("block", "B", "T"), [(32, 4, 300), (BLOCK, 2, BLOCK + 9)])
def test_as_exact_as_the_loop(
    block: int, B: int, T: int, decay: tuple[float, float], holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(launches.SMALL, "gae", launches.Launch(block, 4))
    gamma, lam = decay
    rewards, values = torch.randn(2, B, T)
    mask = holey(B, T) if holes else ragged(B, T)
    eager = reference.gae(rewards, values, mask, gamma=gamma, lam=lam)
    truth = reference.gae(rewards.double(), values.double(), mask, gamma=gamma, lam=lam)
    ours = kernel(rewards, values, mask, gamma, lam)
    for name, *found in zip(("advantages", "returns"), ours, eager, truth, strict=True):
        assert_accurate(*found, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    rewards, values = torch.randn(2, 3, 70).to(dtype)
    mask, wide = holey(3, 70), torch.promote_types(dtype, torch.float32)
    as_given, widened = (kernel(rewards.to(kind), values.to(kind), mask, 1.0, 0.95) for kind in (dtype, wide))
    for got, wanted in zip(as_given, widened, strict=True):
        assert got.dtype == wide
        assert torch.equal(got, wanted)
    assert kernel(rewards, values.double(), mask, 1.0, 0.95)[0].dtype == torch.float64


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_masked_is_harmless(value: float) -> None:
    rewards, values = torch.randn(2, 4, 70)
    mask = holey(4, 70)
    clean = kernel(rewards, values, mask, 0.9, 0.95)
    harmed = kernel(rewards.masked_fill(~mask, value), values.masked_fill(~mask, value), mask, 0.9, 0.95)
    for a, b in zip(clean, harmed, strict=True):
        assert torch.equal(a, b)
        assert (b[~mask] == 0).all()


def test_a_nan_that_counts_is_its_own_sequences() -> None:
    rewards, values = torch.randn(2, 3, 70)
    mask = torch.ones(3, 70, dtype=torch.bool)
    clean = kernel(rewards, values, mask, 0.9, 0.95)
    rewards[1, 40] = math.nan
    for before, after in zip(clean, kernel(rewards, values, mask, 0.9, 0.95), strict=True):
        assert after[1, :41].isnan().all()
        for whole in (0, 2):
            assert torch.equal(before[whole], after[whole])
        assert torch.equal(before[1, 41:], after[1, 41:])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_empty(shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    for got in kernel(zeros, zeros, zeros == 1, 1.0, 0.95):
        assert got.shape == shape
        assert (got == 0).all()


def test_strides() -> None:
    rewards, values = torch.randn(2, 70, 4).transpose(1, 2)
    mask = holey(70, 4).T
    got = kernel(rewards, values, mask, 0.9, 0.95)
    wanted = kernel(rewards.contiguous(), values.contiguous(), mask.contiguous(), 0.9, 0.95)
    assert all(map(torch.equal, got, wanted))

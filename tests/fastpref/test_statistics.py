"""Every statistic of the contract against its definition in 50 digits, from logits and from hidden states."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref_kernels.contract import (
    BOOLEAN,
    COLUMNS,
    DIFFERENTIABLE,
    LINEAR_STATISTICS,
    STATISTICS,
)
from tests.helpers.marks import both, packages
from tests.oracles import statistics as oracles
from tests.oracles.precision import derivative

every_statistic = pytest.mark.parametrize("name", STATISTICS)
every_linear_statistic = pytest.mark.parametrize("name", LINEAR_STATISTICS)
INFINITY = math.inf
TRANSFORMS: dict[str, dict[str, float]] = {
    "plain": {},
    "all": {"temperature": 1.3, "logit_scale": 0.6, "softcap": 4.0},
}
# Rows that have one right answer, and the label of each.
EDGES: dict[str, tuple[list[float], int]] = {
    "one entry": ([2.5], 0),
    "a tie of the best two": ([1.0, 3.0, 3.0, -2.0], 2),
    "all equal": ([0.5] * 6, 0),
    "the best is the last": ([0.0, 1.0, -1.0, 4.0], 3),
    "entries of minus infinity": ([-INFINITY, 2.0, -INFINITY, 1.0], 1),
    "one entry above minus infinity": ([-INFINITY, 2.0, -INFINITY], 1),
    "far apart": ([0.0, 200.0, -300.0], 1),
    "a common offset": ([10000.0, 10001.0, 9998.5], 0),
}


def rows(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits (6, V), and labels of which some are the largest logit's."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(6, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(vocabulary, (6,), generator=generator)
    labels[:2] = logits[:2].argmax(-1)
    return logits, labels


@functools.cache
def definitions(vocabulary: int, dtype: torch.dtype, transform: str) -> list[oracles.Row]:
    """Return the rows of `rows`, transformed."""
    logits, labels = rows(vocabulary, dtype)
    z = [oracles.transformed(row, **TRANSFORMS[transform]) for row in logits]
    return [oracles.Row(*row) for row in zip(z, labels.tolist(), strict=True)]


@functools.cache
def answers(name: str, vocabulary: int, dtype: torch.dtype, transform: str) -> list[Any]:
    """Return a statistic of every row of `rows`."""
    return [oracles.STATISTICS[name](row) for row in definitions(vocabulary, dtype, transform)]


def assert_right(found: Tensor, name: str, answers: list[Any], given: list[oracles.Row]) -> None:
    """Hold a statistic (N,) against its definition, to a few roundings of what the row sums."""
    assert found.shape == (len(given),)
    assert not found.requires_grad or LINEAR_STATISTICS[name] & DIFFERENTIABLE
    if LINEAR_STATISTICS[name] & BOOLEAN:
        assert found.dtype == torch.bool
    for value, wanted, row in zip(found.tolist(), answers, given, strict=True):
        if isinstance(wanted, bool):
            assert value is wanted
            continue
        wanted = float(wanted)
        if not math.isfinite(wanted):
            assert value == wanted
            continue
        size = max(1.0, abs(wanted), *(abs(float(z)) for z in row.z if math.isfinite(float(z))))
        assert abs(value - wanted) <= 32 * torch.finfo(found.dtype).eps * size, f"{value!r}, wanted {wanted!r}"


@packages
@both
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logprobs(dtype: torch.dtype, transform: str, package: Any) -> None:
    logits, labels = rows(37, dtype)
    found = package.token_logprobs(logits, labels, shift=False, **TRANSFORMS[transform])
    wanted = [float(oracles.logprob(row)) for row in definitions(37, dtype, transform)]
    assert found.tolist() == pytest.approx(wanted, rel=8 * torch.finfo(dtype).eps)


@packages
@both
@every_statistic
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 37, 131])
def test_from_logits(vocabulary: int, dtype: torch.dtype, transform: str, name: str, package: Any) -> None:
    logits, labels = rows(vocabulary, dtype)
    found = package.token_logprobs(logits, labels, shift=False, stats=(name,), **TRANSFORMS[transform])
    case = (vocabulary, dtype, transform)
    assert_right(getattr(found, name), name, answers(name, *case), definitions(*case))


@packages
@both
@every_statistic
@pytest.mark.parametrize(("logits", "label"), EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_edges_from_logits(dtype: torch.dtype, logits: list[float], label: int, name: str, package: Any) -> None:
    z = torch.tensor([logits], dtype=dtype)
    found = package.token_logprobs(z, torch.tensor([label]), shift=False, stats=(name,))
    row = oracles.Row(oracles.transformed(z[0]), label)
    assert_right(getattr(found, name), name, [oracles.STATISTICS[name](row)], [row])


@packages
@both
@every_linear_statistic
@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("vocabulary", [1, 2, 37])
def test_from_hidden_states(vocabulary: int, mode: str, name: str, package: Any) -> None:
    # The hidden states pick rows of a table of logits, which the product then has to the last bit.
    logits, labels = rows(vocabulary, torch.float64)
    hidden, weight = torch.eye(6, dtype=torch.float64), logits.T.contiguous()
    options: dict[str, Any] = {"shift": False, "mode": mode, "stats": (name,), **TRANSFORMS["all"]}
    found = package.linear_token_logprobs(hidden, weight, labels, **options)
    case = (vocabulary, torch.float64, "all")
    assert_right(getattr(found, name), name, answers(name, *case), definitions(*case))


@both
def test_dropped_mass() -> None:
    vocabulary, filter_eps = 2 * COLUMNS + 31, 1e-3
    logits, labels = rows(vocabulary, torch.float64)
    logits, labels = logits[::2], labels[::2]
    # The mass of the last two blocks falls from row to row, and the last row's label lies in the third.
    logits[:, COLUMNS:] -= torch.linspace(0, 14, 3, dtype=torch.float64)[:, None]
    labels[2] = vocabulary - 1
    hidden, weight = torch.eye(3, dtype=torch.float64), logits.T.contiguous()
    found = fastpref.linear_token_logprobs(
        hidden, weight, labels, shift=False, mode="recompute", filter_eps=filter_eps, stats=("dropped_mass",)
    )
    wanted = [
        float(oracles.dropped_mass(oracles.Row(oracles.transformed(z), y, filter_eps, COLUMNS)))
        for z, y in zip(logits, labels.tolist(), strict=True)
    ]
    assert 0 in wanted
    assert found.dropped_mass.tolist() == pytest.approx(wanted, rel=1e-6)  # masses are stored in float32


@packages
@both
@every_linear_statistic
def test_only_differentiable_ones_carry_a_gradient(name: str, package: Any) -> None:
    logits, labels = rows(7, torch.float64)
    weight = logits.T.contiguous().requires_grad_()
    options: dict[str, Any] = {"shift": False, "stats": (name,)}
    found = package.linear_token_logprobs(torch.eye(6, dtype=torch.float64), weight, labels, **options)
    value = getattr(found, name)
    assert value.requires_grad == bool(LINEAR_STATISTICS[name] & DIFFERENTIABLE)
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), weight)
        for n, y in enumerate(labels.tolist()):
            wanted = derivative(
                lambda z, y=y: oracles.STATISTICS[name](oracles.Row(z, y)), oracles.transformed(logits[n])
            )
            assert gradient[:, n].tolist() == pytest.approx([float(x) for x in wanted], rel=1e-12, abs=1e-13)


@packages
@both
@every_linear_statistic
def test_is_zero_where_nothing_is_scored(name: str, package: Any) -> None:
    logits, labels = rows(7, torch.float64)
    labels[3] = -100
    found = package.linear_token_logprobs(
        torch.eye(6, dtype=torch.float64), logits.T.contiguous(), labels, shift=False, stats=(name,)
    )
    assert getattr(found, name)[3] == 0

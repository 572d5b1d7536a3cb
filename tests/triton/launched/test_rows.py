"""Rows taken out, multiplied, added back and rescaled, called as they are launched, against the definitions."""

from __future__ import annotations

import os

import pytest
import torch

from fastpref_kernels.eager import linear as definition
from fastpref_kernels.triton import rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else "xpu"
M, H, V = 7, 1029, 40  # a block of features and a part of one
SOURCE = torch.tensor([3, 0, M, 6, M], device=DEVICE)  # there is no row M
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@dtypes
@pytest.mark.parametrize("by_columns", [False, True])
def test_dot(dtype: torch.dtype, by_columns: bool) -> None:
    x, weight = (torch.randn(n, H, dtype=dtype, device=DEVICE) for n in (M, V))
    labels = torch.tensor([0, V - 1, 5, 5, 7, 8, 9], device=DEVICE)
    if by_columns:
        weight = weight.t().contiguous().t()
    truth = (x.double() * weight[labels].double()).sum(-1)
    found = rows.dot(x, weight, labels)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-11)


def test_dot_of_narrow_operands_is_float32() -> None:
    x, weight, labels = torch.ones(2, H), torch.full((3, H), 1.0), torch.tensor([0, 2])
    weight[2] = 1 + 2**-7
    found = rows.dot(x.bfloat16().to(DEVICE), weight.bfloat16().to(DEVICE), labels.to(DEVICE))
    assert found.dtype == torch.float32
    assert found.tolist() == [H, H * (1 + 2**-7)]


@dtypes
@pytest.mark.parametrize("scaled", [False, True])
def test_gather(dtype: torch.dtype, scaled: bool) -> None:
    x = torch.randn(M, H, dtype=dtype, device=DEVICE)
    scale = torch.randn(len(SOURCE), dtype=dtype, device=DEVICE) if scaled else None
    found = rows.gather(x, SOURCE, scale)
    assert torch.equal(found, definition.gather(x, SOURCE, scale))
    assert not found[2].any()
    assert not found[4].any()


def test_gather_leaves_out_what_is_not_there() -> None:
    """A row of NaN stands where a missing row's index points, if it is taken for the last."""
    x = torch.full((M, H), torch.nan, device=DEVICE)
    x[3], x[0] = 1.0, 2.0
    found = rows.gather(x, torch.tensor([3, 0, M], device=DEVICE), None)
    assert found[:, 0].tolist() == [1.0, 2.0, 0.0]


@dtypes
@pytest.mark.parametrize("scaled", [False, True])
def test_scatter_adds(dtype: torch.dtype, scaled: bool) -> None:
    out = torch.randn(M, H, dtype=dtype, device=DEVICE)
    values = torch.randn(len(SOURCE), H, dtype=dtype, device=DEVICE)
    values[2] = torch.nan  # of no row
    scale = torch.randn(len(SOURCE), dtype=dtype, device=DEVICE) if scaled else None
    wanted = out.clone()
    for i, row in enumerate(SOURCE.tolist()):
        if row < M:
            wanted[row] += values[i] if scale is None else scale[i] * values[i]
    rows.scatter(out, SOURCE, values, scale)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


def test_scatter_rounds_once() -> None:
    """0.5 and 2^-9 are lost one by one in bfloat16 beside 1, and not their product's sum with it."""
    out = torch.zeros(2, 4, dtype=torch.bfloat16, device=DEVICE)
    rows.scatter(
        out, torch.tensor([1], device=DEVICE), torch.full((1, 4), 1.0 + 2**-8 + 2**-9, device=DEVICE),
        torch.tensor([2.0], device=DEVICE),
    )  # fmt: skip
    wanted = 2.0 if INTERPRETED else 2.0 + 2**-6  # the interpreter cuts off where a GPU rounds
    assert out.tolist() == [[0.0] * 4, [wanted] * 4]


@dtypes
@pytest.mark.parametrize("pieces", [1, 3, 70])
def test_rescale(dtype: torch.dtype, pieces: int) -> None:
    R, columns = 5, 13
    vocabulary = pieces * columns - (4 if pieces > 1 else 0)
    kept = torch.rand(R, vocabulary + 3, dtype=dtype, device=DEVICE)[:, :vocabulary]
    factors = torch.ones(pieces, R, dtype=torch.float64, device=DEVICE)
    factors[0, 1], factors[-1, 1], factors[pieces // 2, 3] = 0.25, 0.5, 0.0
    wanted = kept * factors.to(dtype).repeat_interleave(columns, 0)[:vocabulary].T
    untouched = kept[4].clone()
    rows.rescale(kept, factors, columns)
    torch.testing.assert_close(kept, wanted, rtol=1e-6, atol=0.0)
    assert torch.equal(kept[4], untouched)


def test_rescale_of_a_factor_that_is_no_number_is_none() -> None:
    kept = torch.ones(2, 8, device=DEVICE)
    rows.rescale(kept, torch.tensor([[torch.nan, 1.0]], device=DEVICE), 8)
    assert kept[0].isnan().all()
    assert (kept[1] == 1.0).all()


def test_nothing_is_launched_for_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    x = torch.ones(M, H, device=DEVICE)
    assert rows.gather(x, none, None).shape == (0, H)
    assert rows.dot(x[:0], x, none).shape == (0,)
    rows.scatter(x, none, x[:0], None)
    rows.rescale(x[:0], torch.ones(1, 0, device=DEVICE), H)
    assert (x == 1.0).all()

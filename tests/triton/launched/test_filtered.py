"""The gradient of rows that keep some tiles of columns, against all of it in float64 with the other tiles' left out."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastpref_kernels import linear
from fastpref_kernels.contract import Transform
from fastpref_kernels.linear.library import fresh_scratch
from fastpref_kernels.triton import filtered, launches
from fastpref_kernels.triton import linear as triton_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else "xpu"
# The interpreter multiplies the bits of bfloat16.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PLAIN, CAPPED = (1.0, 1.0, None), (0.6, 1.3, 4.0)
COLUMNS = 32  # of a tile; the last tile has fewer


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, columns and terms, in more than one group of rows."""
    for size in launches.PICKED:
        monkeypatch.setitem(launches.PICKED, size, launches.Blocks(16, 16, 16, 2, 2, 4))
    monkeypatch.setattr(launches, "PICKED_SUMS", (4, 16, 1))


class Gradients(NamedTuple):
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


class Problem(NamedTuple):
    """Rows with their labels, and whether each keeps each tile."""

    x: Tensor  # (R, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (R,)
    keep: Tensor  # (tiles, R)
    grad: Tensor  # (R,)
    transform: tuple[float, float, float | None]

    @classmethod
    def of(
        cls, R: int, V: int, H: int, dtype: torch.dtype, *, share: float = 0.4, bias: bool = True,
        transform: tuple[float, float, float | None] = PLAIN,
    ) -> Problem:  # fmt: skip
        x, weight, added = torch.randn(R, H), torch.randn(V, H) / H**0.5, torch.randn(V)
        keep = torch.rand(-(-V // COLUMNS), R) < share
        made = (x.to(dtype), weight.to(dtype), added.to(dtype) if bias else None)
        return cls(*made, torch.randint(V, (R,)), keep, torch.randn(R), transform)

    def logits(self) -> Tensor:
        """(R, V) float64, before their transform."""
        return self.x.double() @ self.weight.double().T

    def norm(self) -> Tensor:
        """(3, R) float64: an anchor, 1/S and the log-prob."""
        bias = None if self.bias is None else self.bias.double()
        z = Transform.of(*self.transform).z(self.logits(), bias)[0]
        anchor = z.amax(1) - 1
        z_y, lse = z.gather(1, self.targets[:, None])[:, 0], z.logsumexp(1)
        return torch.stack([anchor, (anchor - lse).exp(), z_y - lse])

    def of_logits(self) -> Tensor:
        """(R, V) float64, the gradient of the logits that are kept."""
        bias = None if self.bias is None else self.bias.double()
        out = torch.empty(len(self.x), len(self.weight), dtype=torch.float64)
        linear.fold_backward(
            self.logits(), bias, self.targets, 0, *self.transform, self.norm(), self.grad.double(), None, out
        )
        return out * self.keep.repeat_interleave(COLUMNS, 0)[: len(self.weight)].T

    def kept(self) -> Tensor:
        """(R, V) what a forward keeps of the logits, as if all gradients were -1: NaN in tiles that are not kept."""
        whole = self._replace(grad=-torch.ones_like(self.grad), keep=torch.ones_like(self.keep))
        e = whole.of_logits() / self.norm()[1][:, None]
        left_out = ~self.keep.repeat_interleave(COLUMNS, 0)[: len(self.weight)].T
        return e.masked_fill(left_out, torch.nan).to(self.x.dtype)

    def truth(self) -> Gradients:
        g = self.of_logits()
        return Gradients(g @ self.weight.double(), g.T @ self.x.double(), g.sum(0))


def compute(
    problem: Problem, stored: bool, into: Gradients | None = None, *, narrow: bool = False,
    wanted: tuple[str, ...] = Gradients._fields,
) -> Gradients:  # fmt: skip
    """Return the launcher's gradients, those `wanted`, added to `into` or written over what nobody wrote."""
    shape, wide = problem.weight.shape, problem.weight.dtype if narrow else torch.float32
    totals = into or Gradients(torch.zeros(problem.x.shape), torch.empty(shape, dtype=wide), torch.empty(shape[0]))
    totals = Gradients(*(total.to(DEVICE, copy=True) for total in totals))
    d_hidden, d_weight, d_bias = (total if name in wanted else None for name, total in totals._asdict().items())
    bias = None if problem.bias is None else problem.bias.to(DEVICE)
    x, weight, targets, keep, grad, norm = (
        t.to(DEVICE)
        for t in (problem.x, problem.weight, problem.targets, problem.keep, problem.grad, problem.norm().float())
    )
    done = filtered.filtered_gradients(
        x, weight, bias, targets, keep, COLUMNS, problem.kept().to(DEVICE) if stored else None, norm, grad,
        problem.transform, d_hidden, d_weight, d_bias, into is not None, fresh_scratch,
    )  # fmt: skip
    assert done
    return Gradients(*(total.cpu() for total in totals))


def assert_right(problem: Problem, stored: bool) -> None:
    found, truth = compute(problem, stored), problem.truth()
    magnitude = Gradients(
        problem.of_logits().abs() @ problem.weight.double().abs(),
        problem.of_logits().abs().T @ problem.x.double().abs(),
        problem.of_logits().abs().sum(0),
    )
    for name, ours, wanted, terms in zip(Gradients._fields, found, truth, magnitude, strict=True):
        assert ours.isfinite().all(), name
        excess = (ours.double() - wanted).abs() - TOLERANCE[problem.x.dtype] * terms
        assert excess.max() <= 1e-9, name
        if ours.dim() == 2:
            assert (ours[(terms == 0).all(1)] == 0).all(), f"{name} of what is left out"


modes = pytest.mark.parametrize("stored", [True, False], ids=["kept", "recomputed"])


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradients(bias: bool, transform: tuple[float, float, float | None], dtype: torch.dtype, stored: bool) -> None:
    """No block divides the rows, the columns or H."""
    assert_right(Problem.of(37, 3 * COLUMNS + 21, 19, dtype, bias=bias, transform=transform), stored)


@modes
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_every_row_and_none(share: float, stored: bool) -> None:
    assert_right(Problem.of(33, 70, 16, torch.float32, share=share), stored)


@modes
@pytest.mark.parametrize(("tile", "row"), [(0, 0), (1, 32), (2, 17)])
def test_one_row_of_one_tile(tile: int, row: int, stored: bool) -> None:
    problem = Problem.of(33, 70, 8, torch.float32, share=0.0)
    problem.keep[tile, row] = True
    assert_right(problem, stored)


@modes
@pytest.mark.parametrize("V", [1, 31, 32, 33])
def test_a_single_row(V: int, stored: bool) -> None:
    problem = Problem.of(1, V, 5, torch.float32, share=1.0)
    assert_right(problem, stored)


@modes
def test_gradients_are_added(stored: bool) -> None:
    problem = Problem.of(20, 70, 9, torch.float32)
    fresh = compute(problem, stored)
    before = Gradients(*map(torch.randn_like, fresh))
    for found, new, old in zip(compute(problem, stored, before), fresh, before, strict=True):
        torch.testing.assert_close(found, new + old, rtol=1e-5, atol=1e-5)


def test_a_narrow_gradient_of_the_head_is_rounded_once() -> None:
    problem = Problem.of(40, 70, 9, torch.float16)
    narrow, wide = (compute(problem, stored=False, narrow=narrow).d_weight for narrow in (True, False))
    assert narrow.dtype == torch.float16
    # The interpreter cuts a float32 off where a GPU rounds it.
    torch.testing.assert_close(narrow.float(), wide, rtol=2.0**-10 if INTERPRETED else 2.0**-11, atol=2.0**-24)


@modes
def test_strided_weight(stored: bool) -> None:
    problem = Problem.of(20, 70, 9, torch.float32)
    across = problem._replace(weight=problem.weight.T.contiguous().T)
    for found, wanted in zip(compute(across, stored), compute(problem, stored), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@modes
def test_not_a_number_stays_in_the_rows_and_tiles_that_keep_it(stored: bool) -> None:
    problem = Problem.of(20, 70, 9, torch.float32)
    problem.keep[:, 3] = torch.tensor([True, False, False])
    clean = compute(problem, stored)
    problem.grad[3] = torch.nan
    found = compute(problem, stored)
    assert found.d_hidden[3].isnan().all()
    assert found.d_weight[:COLUMNS].isnan().all()
    others = torch.arange(20) != 3
    assert torch.equal(found.d_hidden[others], clean.d_hidden[others])
    assert torch.equal(found.d_weight[COLUMNS:], clean.d_weight[COLUMNS:])
    assert torch.equal(found.d_bias[COLUMNS:], clean.d_bias[COLUMNS:])


@modes
def test_two_runs_agree_bit_for_bit(stored: bool) -> None:
    problem = Problem.of(40, 100, 20, torch.float32)
    for first, second in zip(compute(problem, stored), compute(problem, stored), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("wanted", Gradients._fields)
def test_one_gradient_alone(wanted: str) -> None:
    problem = Problem.of(20, 70, 9, torch.float32)
    every = compute(problem, stored=False)
    alone = compute(problem, stored=False, wanted=(wanted,))
    assert torch.equal(getattr(alone, wanted), getattr(every, wanted))


def test_float64_is_refused() -> None:
    problem = Problem.of(2, 70, 9, torch.float64)
    d_weight = torch.full((70, 9), 7.0, dtype=torch.float64)
    done = filtered.filtered_gradients(
        problem.x, problem.weight, None, problem.targets, problem.keep, COLUMNS, None, problem.norm(),
        problem.grad.double(), PLAIN, None, d_weight, None, True, fresh_scratch,
    )  # fmt: skip
    assert not done
    assert (d_weight == 7.0).all()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_picked_rows_of_a_tile(count: int) -> None:
    """The gradient of a tile is that of the picked rows, and what lies past them is neither read nor written."""
    z, targets, norm, grad = torch.randn(6, 50), torch.randint(50, (9,)), torch.rand(3, 9), torch.randn(9)
    z[count:] = torch.nan
    pick = torch.tensor([7, 0, 8, 3, 4, 1])
    here, wanted = pick[:count], torch.full((6, 50), 7.0)
    linear.fold_backward(
        z[:count].double(), None, targets[here], 0, *CAPPED, norm[:, here], grad[here], None, wanted[:count]
    )
    out = torch.full((6, 50), 7.0, device=DEVICE)
    z, targets, norm, grad, pick, number = (t.to(DEVICE) for t in (z, targets, norm, grad, pick, torch.tensor([count])))
    triton_linear.fold_backward(z, None, targets, 0, *CAPPED, norm, grad, None, out, pick, number)
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-4, atol=1e-5)

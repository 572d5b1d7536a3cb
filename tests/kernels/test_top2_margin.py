"""top2_margin, the largest z minus the second largest, of logits and of hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpref_kernels import ops  # noqa: F401  (registers the operators)
from fastpref_kernels.contract import (
    COLUMNS,
    LINEAR_STATISTICS,
    STATISTICS,
    LinearResult,
    LogprobsResult,
    Statistic,
)

pytestmark = pytest.mark.usefixtures("implementation")

INF, NAN = math.inf, math.nan
WIDE = 2 * COLUMNS + 37  # three tiles of columns, and several chunks of a row of logits
Margin = Callable[..., Tensor]


def place(statistics: dict[str, Statistic]) -> int:
    return list(statistics.values()).index(Statistic.TOP2_MARGIN)


def from_logits(
    z: Tensor, labels: Tensor, *, stats: int = Statistic.TOP2_MARGIN, transform: tuple[float, float, float | None]
) -> Tensor:
    """Return the margins (R,) of rows z (R, V)."""
    arguments = (z[None], labels[None], None, None, -100, False, *transform, "none", stats)
    return LogprobsResult.of(torch.ops.fastpref.logprobs(*arguments)).statistics[place(STATISTICS)][0]


def from_hidden_states(
    z: Tensor, labels: Tensor, *, stats: int = Statistic.TOP2_MARGIN, transform: tuple[float, float, float | None]
) -> Tensor:
    """Return the margins (R,) of rows z (R, V), each row by a call of its own: its weight is the row."""
    margins = []
    for row, label in zip(z, labels, strict=True):
        one = torch.ones(1, 1, 1, dtype=z.dtype)
        arguments = (one, row[:, None], None, label[None, None], None, None, -100, False, *transform, stats)
        result = LinearResult.of(torch.ops.fastpref.linear_logprobs(*arguments, None, None, None))
        margins.append(result.statistics[place(LINEAR_STATISTICS)][0])
    return torch.cat(margins)


@pytest.fixture(params=[from_logits, from_hidden_states])
def margin(request: pytest.FixtureRequest) -> Margin:
    def call(
        z: Tensor,
        labels: Tensor,
        *,
        transform: tuple[float, float, float | None] = (1.0, 1.0, None),
        stats: int = Statistic.TOP2_MARGIN,
    ) -> Tensor:
        return request.param(z, labels, stats=stats, transform=transform)

    return call


def every_label(row: list[float]) -> tuple[Tensor, Tensor]:
    """Return a row once for each label that it may have: the best, the second best or neither."""
    return torch.tensor([row] * len(row)), torch.arange(len(row))


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ([1.0, 4.0, 2.5, -3.0], 1.5),
        ([4.0, 1.0, -3.0, 2.5], 1.5),
        ([2.0, 4.0, 4.0, 1.0], 0.0),  # a tie of the best
        ([2.0, 4.0, 2.0, 1.0], 2.0),  # a tie of the second best
        ([3.0, 3.0, 3.0], 0.0),
        ([-INF, 1.0, -2.0], 3.0),
        ([-INF, 1.0, -INF], INF),
        ([-INF, -INF, -INF], NAN),
        ([0.0], INF),
        ([0.0, NAN, 1.0], NAN),
        ([NAN, 0.0, 1.0], NAN),
        ([0.0, 1.0, NAN], NAN),
        ([-100.0, 0.0, 200.0, 100.0], 100.0),  # a row far above a label moves its anchor
    ],
)
def test_small_rows(margin: Margin, row: list[float], wanted: float) -> None:
    z, labels = every_label(row)
    torch.testing.assert_close(margin(z, labels), torch.full((len(row),), wanted), equal_nan=True)


@pytest.mark.parametrize("second", [3, COLUMNS - 1, COLUMNS, WIDE - 1])
@pytest.mark.parametrize("best", [2, 2047, COLUMNS + 1, WIDE - 2])
def test_tiles(margin: Margin, best: int, second: int) -> None:
    """The best two lie in one tile or in two, and the label is the best, the second best or neither."""
    labels = torch.tensor([best, second, 0, COLUMNS // 2, WIDE - 3])
    z = torch.randn(1, WIDE).clamp(-4, 4).repeat(len(labels), 1)
    z[:, best], z[:, second] = 9.0, 7.5
    torch.testing.assert_close(margin(z, labels), torch.full((len(labels),), 1.5))
    z[:, second] = 9.0
    torch.testing.assert_close(margin(z, labels), torch.zeros(len(labels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "transform", [(1.0, 1.0, None), (0.5, 1.0, None), (1.0, 0.7, None), (1.0, 1.0, 5.0), (1.3, 0.7, 5.0)]
)
def test_transform(margin: Margin, dtype: torch.dtype, transform: tuple[float, float, float | None]) -> None:
    scale, temperature, softcap = transform
    x = (3 * torch.randn(3, 4133)).to(dtype)
    z = x.double() * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    best = z.topk(2).values
    wanted = (best[:, 0] - best[:, 1]).to(torch.promote_types(dtype, torch.float32))
    labels = torch.stack([z[0].argmax(), z[1].topk(2).indices[1], torch.tensor(5)])
    torch.testing.assert_close(margin(x, labels, transform=transform), wanted, rtol=1e-5, atol=4e-6)


def test_beside_every_other_statistic(margin: Margin) -> None:
    z, labels = torch.randn(3, 4133), torch.tensor([0, 4132, 77])
    every = sum(STATISTICS.values())
    torch.testing.assert_close(margin(z, labels, stats=every), margin(z, labels), rtol=0, atol=0)


def test_an_infinite_best(margin: Margin) -> None:
    z, labels = every_label([1.0, INF, 0.0])
    assert margin(z, labels).tolist() == [INF] * 3
    z, labels = every_label([INF, INF, 0.0])
    assert margin(z, labels).isnan().all()


def test_unscored_rows_are_zero() -> None:
    labels = torch.tensor([1, -100, 0])
    found = from_logits(torch.tensor([[1.0, 3.0]] * 3), labels, transform=(1.0, 1.0, None))
    assert found.tolist() == [2.0, 0.0, 2.0]


def test_it_is_empty_where_it_is_not_asked_for() -> None:
    arguments = (torch.randn(1, 2, 9), torch.tensor([[1, 2]]), None, None, -100, False, 1.0, 1.0, None, "none", 0)
    assert LogprobsResult.of(torch.ops.fastpref.logprobs(*arguments)).statistics[place(STATISTICS)].shape == (0,)

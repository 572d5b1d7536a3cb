"""A tile of any size gives the same answers, kept exponentials and filters included."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastpref_kernels import linear, ops
from fastpref_kernels.contract import COLUMNS
from fastpref_kernels.linear import Tile
from tests.tolerance import EVERY_STATISTIC

B, T, H, V = 2, 5, 8, 2 * COLUMNS + 1031
SCORING = (-100, True, 1.0, 1.0, None)


class Answer(NamedTuple):
    logps: Tensor
    statistics: tuple[Tensor, ...]
    d_hidden: Tensor
    d_weight: Tensor


def answer(tile: Tile, mode: str, filter_eps: float | None) -> Answer:
    """Score, and differentiate the sum of the log-probs, in tiles of a size."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((B, T, H), (V, H)))
    # A label far below the other logits of some later tile: its row's anchor moves while tiles are folded.
    hidden[0, 2], weight[COLUMNS + 700] = 5.0, 5.0
    labels = torch.randint(V, (B, T), generator=generator)
    labels[1, 2] = -100
    backend = linear.library_backend(linear.fold, linear.fold_backward, tile=lambda: tile)
    rows = int((labels[:, 1:] != -100).sum())
    store = torch.full((rows, V), torch.nan) if mode == "save" else None
    given = (hidden, weight, None, labels, None)
    found = linear.linear_logprobs(backend, *given, store, *SCORING, EVERY_STATISTIC, None, None, filter_eps)
    logps, norm, shares, *statistics = found
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    linear.linear_logprobs_backward_(
        backend, torch.ones_like(logps), None, *given, norm, store, shares, d_hidden, d_weight, None, True, *SCORING,
        None, None, filter_eps,
    )  # fmt: skip
    return Answer(logps, tuple(statistics), d_hidden, d_weight)


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("filter_eps", [None, 1e-3])
@pytest.mark.parametrize("tile", [Tile(3, COLUMNS // 4), Tile(2, COLUMNS), Tile(100, 2 * COLUMNS), Tile(3, V + 9)])
def test_tile_size_changes_no_answer(tile: Tile, filter_eps: float | None, mode: str) -> None:
    found, wanted = (answer(size, mode, filter_eps) for size in (tile, Tile(4096, COLUMNS)))
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


def test_a_tile_is_no_larger_than_it_says() -> None:
    tile, shapes = Tile(3, 2048), []

    def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        shapes.append(tuple(out.shape))
        linear.library_product(out, a, b, add)

    backend = linear.library_backend(linear.fold, linear.fold_backward, tile=lambda: tile)._replace(product=product)
    hidden, weight, labels = torch.randn(1, 8, H), torch.randn(5000, H), torch.randint(5000, (1, 8))
    linear.linear_logprobs(backend, hidden, weight, None, labels, None, None, *SCORING, 0, None, None, None)
    rows, columns = ([shape[i] for shape in shapes] for i in (0, 1))
    assert rows == [3, 3, 3, 3, 3, 3, 1, 1, 1]
    assert columns == [2048, 2048, 904] * 3


def test_the_launch_table_decides_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref_kernels.triton import launches

    registered: list[linear.Backend] = []
    monkeypatch.setattr(ops, "_implement_linear", lambda key, backend: registered.append(backend))
    monkeypatch.setattr(ops, "_implement", lambda *_: None)
    monkeypatch.setattr(ops, "_LIBRARY", type("Nothing", (), {"impl": staticmethod(lambda *_: None)}))
    ops._implement_triton("CUDA")
    monkeypatch.setattr(launches, "TILE", Tile(2048, 16384))
    assert [backend.tile() for backend in registered] == [Tile(2048, 16384)]

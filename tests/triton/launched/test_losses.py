"""Every loss kernel against its definition."""

from __future__ import annotations

import pytest
import torch

from fastpref import dpo_loss, ranking_loss, reference
from fastpref.losses import TABLE, Loss
from fastpref_kernels.triton import losses as kernels
from tests.fastpref.test_losses import evaluate, example
from tests.tolerance import DTYPES, assert_accurate

every_loss = pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)


@every_loss
def test_has_a_kernel(loss: Loss) -> None:
    assert callable(getattr(kernels, loss.operator))
    assert hasattr(torch.ops.fastpref, loss.operator)


@every_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("batch", [0, 1, 130])
def test_value_and_gradient(loss: Loss, batch: int, reduction: str, dtype: torch.dtype) -> None:
    arguments = example(loss, batch, dtype)
    ours = evaluate(loss.function, arguments, dtype, reduction=reduction)
    eager = evaluate(loss.reference, arguments, dtype, reduction=reduction)
    truth = evaluate(loss.reference, arguments, torch.float64, reduction=reduction)
    for i, (a, b, c) in enumerate(zip(ours, eager, truth, strict=True)):
        assert_accurate(a, b, c, f"output {i}")


@every_loss
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extremes(loss: Loss, scale: float) -> None:
    arguments = example(loss, 7, torch.float32, scale)
    ours = evaluate(loss.function, arguments, torch.float32)
    truth = evaluate(loss.reference, arguments, torch.float64)
    for a, b in zip(ours, truth, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("reference_free", [False, True])
def test_dpo_options(smoothing: float, reference_free: bool) -> None:
    loss = next(row for row in TABLE if row.name == "dpo_loss:sigmoid")
    arguments = example(loss, 9)
    options = {"label_smoothing": smoothing, "beta": 0.3, "reference_free": reference_free}
    policy = arguments[0][:2] if reference_free else arguments[0]
    ours = evaluate(dpo_loss, (policy, options), torch.float64)
    truth = evaluate(reference.dpo_loss, (policy, options), torch.float64)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_best_that_is_no_answer_is_nan() -> None:
    rewards = torch.randn(4, 3)
    losses, partials = kernels.best_of_k_loss(rewards, torch.tensor([0, 3, -1, 7]), "none")
    assert losses.isnan().tolist() == [False, True, True, True]
    assert partials.isnan().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("k", [2, 3, 9, 33, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_ranking_of_k(k: int, masked: bool) -> None:
    rewards = torch.randn(3, k, dtype=torch.float64)
    options = {"mask": torch.rand(3, k) < 0.6} if masked else {}
    arguments = ((rewards, torch.randint(k, (3, k))), options)
    ours = evaluate(ranking_loss, arguments, torch.float64)
    truth = evaluate(reference.ranking_loss, arguments, torch.float64)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

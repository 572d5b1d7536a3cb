"""Every loss kernel against its definition."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastpref import dpo_loss, kto_loss, plackett_luce_loss, ranking_loss, reference
from fastpref.losses import TABLE, Loss
from fastpref_kernels import ops
from fastpref_kernels.triton.losses import reward
from tests.helpers.losses import Arguments, evaluate, example
from tests.tolerance import DTYPES, assert_accurate

every_loss = pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)


@every_loss
def test_has_a_kernel(loss: Loss) -> None:
    module = importlib.import_module(f"fastpref_kernels.triton.{ops.LOSSES[loss.operator]}")
    assert callable(getattr(module, loss.operator))
    assert hasattr(torch.ops.fastpref, loss.operator)


@every_loss
@pytest.mark.parametrize(
    ("batch", "reduction", "dtype"),
    [
        *((70, reduction, dtype) for reduction in ("none", "mean") for dtype in DTYPES),
        (70, "sum", torch.float32),
        *((batch, reduction, torch.float32) for batch in (0, 1) for reduction in ("none", "mean")),
    ],
    ids=str,
)
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


def agree(function: Callable[..., Any], definition: Callable[..., Any], arguments: Arguments, **options: Any) -> None:
    ours = evaluate(function, arguments, torch.float64, **options)
    truth = evaluate(definition, arguments, torch.float64, **options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


DPO = {name: row for row in TABLE if (name := row.options.get("loss_type")) is not None}
N = 9
PER_PAIR = torch.linspace(0.1, 2.0, N, dtype=torch.float64)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "label_smoothing": [{"label_smoothing": value} for value in (0.1, 0.4)],
    "length_normalize": [{"length_normalize": True}],
    "margin": [{"margin": 0.7}, {"margin": PER_PAIR}, {"margin": torch.arange(N)}],
    "weights": [{"weights": PER_PAIR}, {"weights": torch.arange(N, dtype=torch.int32)}],
    "f_divergence": [
        {"f_divergence": "forward_kl"},
        {"f_divergence": "js"},
        *({"f_divergence": "alpha", "f_alpha": alpha} for alpha in (-1.0, 0.5, 1.0, 2.0)),
    ],
    "delta": [{"delta": 0.4}],
    "gamma": [{"gamma": 1.5}],
    "discopop_tau": [{"discopop_tau": 0.5}, {"discopop_tau": 2.0}],
}


@pytest.mark.parametrize("name", DPO)
def test_dpo_options(name: str) -> None:
    row = DPO[name]
    tensors, options = example(row, N)
    cases = [{"beta": 0.3}, *(case for taken in row.takes for case in OPTIONS[taken])]
    if name != "sft":
        cases += [{"sft_weight": 0.7, "sft_reduction": how} for how in ("token", "sequence")]
    if row.function is dpo_loss and len(tensors) == 4:
        cases += [{"reference_free": True}]
    for case in cases:
        policy = tensors[:2] if case.get("reference_free") else tensors
        for reduction in ("none", "mean"):
            agree(dpo_loss, reference.dpo_loss, (policy, {**options, **case}), reduction=reduction)


@pytest.mark.parametrize(
    ("types", "weights"),
    [
        (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
        (("simpo", "sigmoid"), None),
        (("sft",), (0.5,)),
        (("aot", "sft"), (1.0, 0.3)),
        ({"sigmoid": 0.5, "hinge": 3.0}, None),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_several_types(types: Any, weights: tuple[float, ...] | None, reduction: str) -> None:
    tensors, options = example(DPO["sigmoid"], N)
    options |= {"loss_type": types, "loss_weights": weights}
    if types == ("sft",):
        tensors = tensors[:2]
    agree(dpo_loss, reference.dpo_loss, (tensors, options), reduction=reduction)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_ties_and_several_programs_are_sorted_as_by_the_definition(name: str) -> None:
    tensors, options = example(DPO[name], 200)
    tied = tuple(tensor.round() for tensor in tensors)
    agree(dpo_loss, reference.dpo_loss, (tied, {**options, "label_smoothing": 0.1}), reduction="none")


@pytest.mark.parametrize("kl", [0.3, -0.3, torch.tensor(0.3), torch.linspace(-1, 3, 150), torch.zeros(0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_kto(kl: Any, reduction: str) -> None:
    row = next(row for row in TABLE if row.name == "kto_loss")
    tensors, options = example(row, 100)
    agree(kto_loss, reference.kto_loss, (tensors, {**options, "kl": kl, "desirable_weight": 0.6}), reduction=reduction)


@pytest.mark.parametrize("name", ["sigmoid", "orpo", "discopop", "exo_pair", "forward_kl"])
def test_far_pairs_are_finite(name: str) -> None:
    """Where a factor overflows, or a probability is 1, and the answer does not."""
    far = torch.tensor([-1e4, -300.0, -1.0, -1e-9, -1e-30, 0.0])
    tensors = (far, torch.full_like(far, -2.0), torch.full_like(far, -1.0), torch.full_like(far, -0.5))
    options: dict[str, Any] = {"loss_type": name, "chosen_lengths": torch.ones(6), "rejected_lengths": torch.ones(6)}
    if name == "forward_kl":
        options |= {"loss_type": "hinge", "f_divergence": "forward_kl"}
        tensors = (tensors[1], tensors[0], *tensors[2:])  # the rejected completion's overflows: the gap is met
    if name == "exo_pair":
        options["label_smoothing"] = 0.1
    if name == "orpo":
        tensors = tensors[:2]
    ours = evaluate(dpo_loss, (tensors, options), torch.float32, reduction="none")
    truth = evaluate(reference.dpo_loss, (tensors, options), torch.float64, reduction="none")
    for a, b in zip(ours, truth, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DPO)
def test_a_log_prob_of_minus_infinity_is_as_by_the_definition(name: str) -> None:
    """A label may have no probability: where its loss and gradient are numbers, they are numbers."""
    tensors, options = example(DPO[name], 4, torch.float32)
    for column in range(len(tensors)):
        given = [tensor.clone() for tensor in tensors]
        given[column][2] = -math.inf
        ours = evaluate(dpo_loss, (tuple(given), options), torch.float32, reduction="none")
        truth = evaluate(reference.dpo_loss, (tuple(given), options), torch.float32, reduction="none")
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_small_differences_of_options_keep_their_digits() -> None:
    tensors, options = example(DPO["sigmoid"], N)
    policy = tuple(tensor.float() for tensor in tensors)
    for case in (
        {"f_divergence": "alpha", "f_alpha": 1 - 1e-9},
        {"loss_type": "robust", "label_smoothing": 0.49999},
    ):
        ours = evaluate(dpo_loss, (policy, {**options, **case}), torch.float32)
        truth = evaluate(reference.dpo_loss, (policy, {**options, **case}), torch.float64)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_a_best_that_is_no_answer_is_nan() -> None:
    rewards = torch.randn(4, 3)
    losses, partials = reward.best_of_k_loss(rewards, torch.tensor([0, 3, -1, 7]), "none")
    assert losses.isnan().tolist() == [False, True, True, True]
    assert partials.isnan().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("k", [2, 3, 9, 33, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_rankings_of_k(k: int, masked: bool) -> None:
    rewards = torch.randn(3, k, dtype=torch.float64)
    options = {"mask": torch.rand(3, k) < 0.6} if masked else {}
    agree(ranking_loss, reference.ranking_loss, ((rewards, torch.randint(k, (3, k))), options))
    order = torch.rand(3, k).argsort(-1)
    agree(plackett_luce_loss, reference.plackett_luce_loss, ((rewards, order), options))


def test_what_is_masked_reaches_no_ranking() -> None:
    rewards = torch.tensor([[1.0, math.nan, 3.0, math.inf], [math.nan] * 4])
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    for function in (ranking_loss, plackett_luce_loss):
        loss, gradient = evaluate(
            function, ((rewards, torch.arange(4).expand(2, 4)), {"mask": mask}), torch.float32, reduction="none"
        )
        torch.testing.assert_close(loss, torch.tensor([math.log1p(math.e**2), 0.0]))
        assert gradient[~mask].eq(0).all()

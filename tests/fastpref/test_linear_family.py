"""Every loss type from hidden states, whole and in chunks, and what runs around such a loss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpref
from fastpref import reference
from fastpref.losses import LOSS_TYPES
from tests.fastpref.test_linear_preference import PAIRS, assert_near, leaves_of, make, pack

PER_PAIR = torch.linspace(0.5, 1.5, PAIRS, dtype=torch.float64)
REFS = -10 * torch.rand(2, PAIRS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
# 9 scored rows a pair at the most: all pairs in one chunk, one pair a chunk, and no whole pair in any.
chunks = pytest.mark.parametrize("chunk_rows", [None, 11, 4])
packages = pytest.mark.parametrize("package", [fastpref, reference], ids=["fastpref", "reference"])


def cases(name: str) -> list[dict[str, Any]]:
    """The type plain, and with all that it takes."""
    plain: dict[str, Any] = {"loss_type": name}
    if name == "exo_pair":
        plain["label_smoothing"] = 0.2
    takes = LOSS_TYPES[name].takes
    full: dict[str, Any] = {
        "margin": PER_PAIR, "weights": PER_PAIR.flip(0), "length_normalize": True, "f_divergence": "js",
        "label_smoothing": 0.1, "delta": 0.2, "gamma": 0.8, "discopop_tau": 0.5,
    }  # fmt: skip
    full = {option: value for option, value in full.items() if option in takes}
    if name != "sft":
        full |= {"sft_weight": 0.4, "sft_reduction": "sequence"}
    return [plain, {**plain, **full, "beta": 0.3}]


def evaluate(package: Any, dtype: torch.dtype, *, packed: bool = False, **options: Any) -> dict[str, Tensor]:
    operands, labels = make()
    leaves = leaves_of(operands, dtype)
    hidden: Tensor = leaves["hidden"]
    where = {}
    if packed:
        hidden, labels, where["cu_seqlens"] = pack(hidden, labels)
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    out = package.linear_dpo_loss(
        hidden, leaves["weight"], labels, *REFS.to(dtype), bias=leaves["bias"], **where, **given
    )
    out.loss.backward()
    return {**out._asdict(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


@chunks
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_every_type(name: str, packed: bool, chunk_rows: int | None) -> None:
    for options in cases(name):
        ours = evaluate(fastpref, torch.float32, packed=packed, chunk_rows=chunk_rows, **options)
        truth = evaluate(reference, torch.float64, **options)
        for field, value in truth.items():
            assert_near(ours[field], value, torch.float32, field)


@chunks
def test_several_types(chunk_rows: int | None) -> None:
    options: dict[str, Any] = {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 0.5)}
    ours = evaluate(fastpref, torch.float32, chunk_rows=chunk_rows, **options)
    truth = evaluate(reference, torch.float64, **options)
    for field, value in truth.items():
        assert_near(ours[field], value, torch.float32, field)


@packages
def test_lengths_are_the_numbers_of_scored_labels_unless_given(package: Any) -> None:
    _, labels = make()
    counted = (labels[:, 1:] != -100).sum(1)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), counted.chunk(2), strict=True))
    loss = evaluate(package, torch.float64, loss_type="simpo")["loss"]
    assert torch.equal(loss, evaluate(package, torch.float64, loss_type="simpo", **lengths)["loss"])
    lengths["chosen_lengths"] = lengths["chosen_lengths"] + 1
    assert not torch.equal(loss, evaluate(package, torch.float64, loss_type="simpo", **lengths)["loss"])


@packages
@pytest.mark.parametrize(
    "options", [{"loss_type": "orpo"}, {"sft_weight": 0.1}, {"length_normalize": True}, {"loss_type": "sft"}]
)
def test_means_are_not_divided_again(package: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"average_logps=True makes means, and loss_type .* divides by lengths"):
        evaluate(package, torch.float32, average_logps=True, **options)


@packages
def test_types_without_a_reference_need_none_and_ignore_one(package: Any) -> None:
    operands, labels = make()
    call = (operands["hidden"], operands["weight"], labels)
    alone = package.linear_dpo_loss(*call, loss_type="cpo")
    with_one = package.linear_dpo_loss(*call, *REFS, loss_type="cpo")
    assert torch.equal(alone.loss, with_one.loss)
    assert torch.equal(alone.chosen_rewards, with_one.chosen_rewards)
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        package.linear_dpo_loss(*call, loss_type=("cpo", "sigmoid"))


def step(chunk_rows: int, context: Any = None, loss_fn: Any = None) -> tuple[Tensor, ...]:
    """A loss through a layer, so that there is something to checkpoint or offload."""
    operands, labels = make(dtype=torch.float32)
    leaves = leaves_of(operands)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        tripled = torch.tanh(3 * hidden)
        if loss_fn is not None:
            return fastpref.linear_preference_loss(
                tripled, weight, labels, loss_fn, group_size=2, chunk_rows=chunk_rows
            ).loss
        return fastpref.linear_dpo_loss(tripled, weight, labels, *REFS.float(), chunk_rows=chunk_rows).loss

    if context == "checkpoint":
        value = checkpoint(loss, leaves["hidden"], leaves["weight"], use_reentrant=False)
    elif context == "offload":
        with torch.autograd.graph.save_on_cpu():
            value = loss(leaves["hidden"], leaves["weight"])
    else:
        value = loss(leaves["hidden"], leaves["weight"])
    assert isinstance(value, Tensor)
    value.backward()
    return value, leaves["hidden"].grad, leaves["weight"].grad


@pytest.mark.parametrize("chunk_rows", [100, 11, 4])
@pytest.mark.parametrize("context", ["checkpoint", "offload"])
def test_under_hooks_on_what_is_saved(context: str, chunk_rows: int) -> None:
    for found, plain in zip(step(chunk_rows, context), step(chunk_rows), strict=True):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("chunk_rows", [100, 11, 4])
def test_what_a_loss_closes_over_is_constant(chunk_rows: int) -> None:
    margin = torch.zeros(PAIRS, requires_grad=True)
    with pytest.raises(ValueError, match=r"depends on a torch.float32 tensor of shape \(3,\).*detach it"):
        step(chunk_rows, loss_fn=lambda logps: (logps[:, 0] - logps[:, 1] - margin) ** 2)
    step(chunk_rows, loss_fn=lambda logps: (logps[:, 0] - logps[:, 1] - margin.detach()) ** 2)


@pytest.mark.parametrize("chunk_rows", [100, 11])
def test_a_loss_that_ignores_its_argument_has_no_gradient(chunk_rows: int) -> None:
    _, *gradients = step(chunk_rows, loss_fn=lambda logps: torch.ones(len(logps)) + 0 * logps[:, 0])
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("chunk_rows", [100, 11])
def test_a_reference_of_a_wider_dtype_widens_nothing(chunk_rows: int) -> None:
    operands, labels = make(dtype=torch.float32)
    leaves = leaves_of(operands)
    for package in (fastpref, reference):
        out = package.linear_dpo_loss(leaves["hidden"], leaves["weight"], labels, *REFS, chunk_rows=chunk_rows)
        assert {value.dtype for value in out} == {torch.float32}


def test_saved_exponentials_are_the_policys_alone() -> None:
    operands, labels = make(dtype=torch.float32)
    leaves = leaves_of(operands)
    ref = {f"ref_{name}": operands[name].half() for name in ("hidden", "weight")}
    out = fastpref.linear_dpo_loss(leaves["hidden"], leaves["weight"], labels, mode="save", **ref)
    assert out.loss.isfinite()


def test_the_first_loss_imports_no_compiler() -> None:
    """What a first step imports is memory that stays: a compiler would be as much as the step itself."""
    code = """
import sys, torch, fastpref
hidden, weight = torch.randn(8, 5, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
labels = torch.zeros(8, 5, dtype=torch.int64)
fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True, chunk_rows=8).loss.backward()
print(*(name for name in ("torch._inductor", "triton", "torch._dynamo") if name in sys.modules))
"""
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []

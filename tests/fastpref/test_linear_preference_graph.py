"""Preference losses from hidden states under autograd, autocast, checkpoints and torch.compile."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpref
from fastpref import reference
from tests.helpers.linear_preference import PAIRS, TIME, VOCABULARY, Operands, gradients, leaves_of, make, plackett_luce
from tests.helpers.marks import both, narrow


def dpo(leaves: Operands, labels: Tensor, **options: Any) -> Any:
    return fastpref.linear_dpo_loss(
        leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), reference_free=True, **options
    )


def ranked(leaves: Operands, labels: Tensor, **options: Any) -> Any:
    return fastpref.linear_preference_loss(
        leaves["hidden"], leaves["weight"], labels, plackett_luce, bias=leaves.get("bias"), group_size=3, **options
    )


@both
@pytest.mark.parametrize("loss", [dpo, ranked])
@pytest.mark.parametrize("chunk_rows", [None, 1, 18])
class TestGraph:
    def test_only_the_loss_is_differentiable(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        found = loss(leaves_of(operands), labels, chunk_rows=chunk_rows, stats=("entropy", "lse", "dropped_mass"))
        assert [name for name, value in found._asdict().items() if value.requires_grad] == ["loss"]
        assert found._fields[-3:] == ("entropy", "lse", "dropped_mass")
        assert found.entropy.shape == (2 * PAIRS, TIME - 1)
        assert not found.dropped_mass.any()

    def test_no_grad(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        leaves = leaves_of(operands)
        wanted = loss(leaves, labels, chunk_rows=chunk_rows)
        with torch.no_grad():
            found = loss(leaves, labels, chunk_rows=chunk_rows)
        for got, value in zip(found, wanted, strict=True):
            assert not got.requires_grad
            torch.testing.assert_close(got, value.detach())

    @narrow
    def test_retain_graph_gives_the_same_gradient_again(
        self, dtype: torch.dtype, chunk_rows: int | None, loss: Callable[..., Any]
    ) -> None:
        operands, labels = make(dtype=dtype)
        leaves = leaves_of(operands)
        value = loss(leaves, labels, chunk_rows=chunk_rows).loss
        inputs = list(leaves.values())
        first = torch.autograd.grad(3.0 * value, inputs, retain_graph=True)
        second = torch.autograd.grad(3.0 * value, inputs, retain_graph=True)
        single = torch.autograd.grad(value, inputs, retain_graph=True)
        for one, other, alone in zip(first, second, single, strict=True):
            assert torch.equal(one, other)
            close = 2 * torch.finfo(dtype).eps * one.abs().max().item()
            torch.testing.assert_close(one, 3 * alone, rtol=0, atol=max(close, 1e-6))
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()

    @pytest.mark.parametrize(
        "frozen", [("weight", "bias"), ("hidden", "bias"), ("hidden", "weight"), ("weight",)], ids=",".join
    )
    def test_frozen_operands_get_no_gradient(
        self, frozen: tuple[str, ...], chunk_rows: int | None, loss: Callable[..., Any]
    ) -> None:
        operands, labels = make()
        wanted, leaves = leaves_of(operands), leaves_of(operands)
        for name in frozen:
            leaves[name].requires_grad_(False)
        loss(wanted, labels, chunk_rows=chunk_rows).loss.backward()
        loss(leaves, labels, chunk_rows=chunk_rows).loss.backward()
        for name, leaf in leaves.items():
            if name in frozen:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(leaf.grad, wanted[name].grad)

    def test_expanded_incoming_gradient(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        found = []
        for expand in (True, False):
            leaves = leaves_of(operands)
            losses = loss(leaves, labels, chunk_rows=chunk_rows, reduction="none").loss
            upstream = torch.tensor(1.7, dtype=torch.float64).expand(losses.shape)
            losses.backward(upstream if expand else upstream.contiguous())
            found.append(gradients(leaves))
        for name, value in found[0].items():
            assert torch.equal(value, found[1][name])

    def test_gradients_accumulate(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        once, twice = leaves_of(operands), leaves_of(operands)
        loss(once, labels, chunk_rows=chunk_rows).loss.backward()
        for _ in range(2):
            loss(twice, labels, chunk_rows=chunk_rows).loss.backward()
        for name, value in gradients(twice).items():
            torch.testing.assert_close(value, 2 * gradients(once)[name])

    @pytest.mark.usefixtures("unpoisoned")
    def test_two_runs_agree_bit_for_bit(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make(dtype=torch.float32)
        runs = []
        for _ in range(2):
            leaves = leaves_of(operands)
            found = loss(leaves, labels, chunk_rows=chunk_rows)
            found.loss.backward()
            runs.append((*found, *gradients(leaves).values()))
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)

    def test_everything_masked(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        operands["hidden"].fill_(math.nan)
        leaves = leaves_of(operands)
        found = loss(leaves, torch.full_like(labels, -100), chunk_rows=chunk_rows)
        found.loss.backward()
        assert found.loss.isfinite()
        for value in gradients(leaves).values():
            assert (value == 0).all()

    def test_no_sequences(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        operands["hidden"] = operands["hidden"][:0]
        for reduction in ("mean", "sum"):
            leaves = leaves_of(operands)
            found = loss(leaves, labels[:0], chunk_rows=chunk_rows, reduction=reduction)
            found.loss.backward()
            assert found.loss.item() == 0
            assert not any(value.any() for value in gradients(leaves).values())

    def test_nan_in_a_row_that_is_not_scored_has_no_effect(
        self, chunk_rows: int | None, loss: Callable[..., Any]
    ) -> None:
        operands, labels = make()
        runs = []
        for poisoned in (False, True):
            if poisoned:
                operands["hidden"][:, -1] = math.nan
                operands["hidden"][2, :2] = math.nan
            leaves = leaves_of(operands)
            found = loss(leaves, labels, chunk_rows=chunk_rows)
            found.loss.backward()
            runs.append((*found, *gradients(leaves).values()))
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)

    def test_nan_in_a_scored_row_harms_its_group_alone(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        clean = loss(operands, labels, chunk_rows=chunk_rows, reduction="none").loss
        operands["hidden"][1, 4] = math.nan
        found = loss(operands, labels, chunk_rows=chunk_rows, reduction="none").loss
        assert found.isnan().nonzero().flatten().tolist() == [1]
        torch.testing.assert_close(found[~found.isnan()], clean[~found.isnan()])

    def test_label_out_of_range_is_named(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        labels[4, 3] = VOCABULARY
        with pytest.raises(IndexError, match=rf"{VOCABULARY}\b.*\[4, 2\].*\[0, {VOCABULARY}\)"):
            loss(leaves_of(operands), labels, chunk_rows=chunk_rows)

    def test_autocast(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make(dtype=torch.float32)
        leaves = leaves_of(operands)
        rounded = leaves_of({name: value.bfloat16() for name, value in operands.items()}, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(leaves, labels, chunk_rows=chunk_rows)
        found.loss.backward()
        truth = loss(rounded, labels)
        truth.loss.backward()
        for value, wanted in zip(found, truth, strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-4)
        for name, value in gradients(leaves).items():
            assert value.dtype == torch.float32
            wanted = gradients(rounded)[name]
            torch.testing.assert_close(value.double(), wanted, rtol=0, atol=0.02 * wanted.abs().max().item())

    def test_int32_labels_and_strided_operands(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        wanted = leaves_of(operands)
        loss(wanted, labels, chunk_rows=chunk_rows).loss.backward()
        leaves = leaves_of(operands)
        strided = {
            "hidden": leaves["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
            "weight": leaves["weight"].T.contiguous().T,
            "bias": leaves["bias"].repeat_interleave(2)[::2],
        }
        loss(strided, labels.int().T.contiguous().T, chunk_rows=chunk_rows).loss.backward()
        for name, value in gradients(leaves).items():
            torch.testing.assert_close(value, gradients(wanted)[name])


@pytest.mark.usefixtures("unpoisoned", "fresh_compiler")
@pytest.mark.parametrize("stats", [(), ("entropy",)], ids=["plain", "statistics"])
@pytest.mark.parametrize("pairs_of_a_chunk", [1, PAIRS])
def test_dpo_compiles_to_one_graph(stats: tuple[str, ...], pairs_of_a_chunk: int) -> None:
    operands, labels = make(dtype=torch.float32)
    chunk_rows = pairs_of_a_chunk * 2 * labels.shape[1]
    refs = torch.full((PAIRS,), -15.0), torch.full((PAIRS,), -16.0)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ref: tuple[Tensor, Tensor]) -> Any:
        return fastpref.linear_dpo_loss(hidden, weight, labels, *ref, bias=bias, stats=stats, chunk_rows=chunk_rows)

    runs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(operands)
        found = function(*leaves.values(), labels, refs)
        found.loss.backward()
        runs.append({**found._asdict(), "margins": found.margins, **gradients(leaves)})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-6, atol=1e-6)


REFS = -10 * torch.rand(2, PAIRS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def step(chunk_rows: int, context: Any = None, loss_fn: Any = None) -> tuple[Tensor, ...]:
    """Return a loss and its gradients, through a layer whose activations can be checkpointed or offloaded."""
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


def test_saved_exponentials_belong_to_the_policy_alone() -> None:
    operands, labels = make(dtype=torch.float32)
    leaves = leaves_of(operands)
    ref = {f"ref_{name}": operands[name].half() for name in ("hidden", "weight")}
    out = fastpref.linear_dpo_loss(leaves["hidden"], leaves["weight"], labels, mode="save", **ref)
    assert out.loss.isfinite()


def test_the_first_loss_imports_no_compiler() -> None:
    """The first step imports no compiler, which would hold as much memory as the step itself."""
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

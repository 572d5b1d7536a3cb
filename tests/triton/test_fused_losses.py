"""What happens around the launch of a loss, which is stubbed: what the kernel writes is tested in `launched/`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks import sass
from benchmarks.stubbed_driver import stubbed_launches
from benchmarks.triton_on_cpu import launchers_on_cpu
from fastpref import dpo_loss
from fastpref.losses import TABLE, Loss
from fastpref_kernels import ops
from fastpref_kernels.triton.losses import preference, reward


@pytest.fixture(autouse=True)
def stubbed() -> Iterator[None]:
    torch._dynamo.reset()  # compiles of one function are counted over all tests
    with stubbed_launches(sass.TARGETS["sm_90"]), launchers_on_cpu():
        yield


def example(row: Loss, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    tensors, options = row.example(torch.Generator().manual_seed(0), 8)
    given = [tensor.to(dtype).requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors]
    return given, {**row.options, **options}


def value(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "row", [row for row in TABLE if ":" not in row.name or "sigmoid" in row.name], ids=lambda row: row.name
)
def test_one_graph_with_gradients_of_the_inputs_dtypes(row: Loss, dtype: torch.dtype) -> None:
    given, options = example(row, dtype)
    compiled = torch.compile(row.function, fullgraph=True, backend="aot_eager")
    for function in (row.function, compiled):
        loss = value(function(*given, **options))
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        leaves = [tensor for tensor in given if tensor.requires_grad]
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            assert (grad.shape, grad.dtype) == (leaf.shape, dtype)
        with torch.no_grad():
            assert not value(function(*given, **options)).requires_grad


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_second_step_launches_what_the_first_compiled(row: Loss) -> None:
    given, options = example(row)
    row.function(*given, **options)
    kernels = [kernel for module in (preference, reward) for kernel in vars(module).values()]
    with ExitStack() as stack:
        for kernel in kernels:
            if isinstance(kernel, JITFunction):  # Triton's own launch looks here for what it has compiled
                stack.enter_context(mock.patch.object(kernel, "device_caches", None))
        row.function(*given, **options)


def test_several_types_are_one_graph() -> None:
    (row,) = [row for row in TABLE if row.name == "dpo_loss:sigmoid"]
    given, options = example(row)
    options |= {"loss_type": ("sigmoid", "bco_pair"), "margin": torch.ones(8)}
    compiled = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(*given, **options).loss
    assert [grad.shape for grad in torch.autograd.grad(loss, given[:2])] == [(8,), (8,)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_backward_scales_each_tensors_row_of_the_partial_derivatives(reduction: str) -> None:
    partials = torch.arange(32.0).view(4, 8)
    real = preference.dpo_loss

    def launcher(*arguments: Any) -> tuple[Tensor, ...]:
        loss, _, *rewards = real(*arguments)
        return loss, partials.clone(), *rewards

    given = [torch.randn(8, dtype=torch.float64 if i == 3 else torch.float32).requires_grad_(i != 1) for i in range(4)]
    with mock.patch.object(preference, "dpo_loss", launcher):
        loss = dpo_loss(*given, reduction=reduction).loss
    upstream = torch.full_like(loss, 2.0)
    loss.backward(upstream)
    assert given[1].grad is None
    for i in (0, 2, 3):
        torch.testing.assert_close(given[i].grad, (2 * partials[i]).to(given[i].dtype), rtol=0, atol=0)


def test_a_step_with_options_seen_before_packs_no_float() -> None:
    given, options = example(next(row for row in TABLE if row.name == "dpo_loss:sigmoid"))
    dpo_loss(*given, **options, beta=0.25)
    with mock.patch("struct.pack", side_effect=AssertionError):
        dpo_loss(*given, **options, beta=0.25)
        with pytest.raises(AssertionError):
            dpo_loss(*given, **options, beta=0.75)


def raised(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[type[Exception], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*arguments, **options)
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, {"beta": -1.0}),
        ({}, {"beta": True}),  # equals 1.0, which was right
        ({}, {"length_normalize": 0}),
        ({}, {"loss_type": "none"}),
        ({}, {"reduction": "most", "beta": 0.0}),
        ({}, {"margin": math.nan}),
        ({}, {"delta": 0.5}),
        ({}, {"weights": torch.ones(8, 1)}),
        ({}, {"loss_type": "sigmoid_norm"}),
        ({1: torch.ones(7)}, {"beta": -1.0}),
        ({0: torch.ones(8, dtype=torch.int64)}, {}),
        ({0: torch.ones(8, 1)}, {}),
        (dict.fromkeys(range(4), torch.ones(8, dtype=torch.int64)), {}),
        (dict.fromkeys(range(4), torch.ones(8, 1)), {}),
        (dict.fromkeys(range(4), torch.ones(8).to_sparse()), {}),
        ({2: None}, {}),
        ({3: torch.ones(8, device="meta")}, {}),
        ({3: torch.ones(8).to_sparse()}, {}),
    ],
)
def test_errors_are_those_without_a_launch(changed: dict[int, Any], options: dict[str, Any]) -> None:
    given = [torch.ones(8) for _ in range(4)]
    dpo_loss(*given, beta=1.0, length_normalize=False)
    for i, tensor in changed.items():
        given[i] = tensor
    launched = raised(dpo_loss, *given, **options)
    with mock.patch.object(ops, "fuses_losses", return_value=False):
        assert raised(dpo_loss, *given, **options) == launched

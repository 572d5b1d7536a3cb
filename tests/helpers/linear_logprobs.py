"""Operands of the log-probs from hidden states, and the check of a call against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref_kernels.contract import Transform
from tests.tolerance import assert_accurate

NAMES = ("linear_token_logprobs", "linear_sequence_logprobs")
MODES = ("auto", "save", "recompute")
# What a log-prob, or a statistic made of logits, may be off by.
BOUNDS = {torch.float16: 1e-4, torch.bfloat16: 1e-4, torch.float32: 1e-5, torch.float64: 1e-12}
modes = pytest.mark.parametrize("mode", MODES)
Operands = dict[str, Tensor]


def make(
    rows: tuple[int, ...], vocabulary: int, features: int = 9, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> tuple[Operands, Tensor]:
    """Return operands whose logits spread by about 3, and labels: the first and last entries, three tenths ignored."""
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(scale: float, *shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    operands = {
        "hidden": normal(1.0, *rows, features),
        "weight": normal(3 / math.sqrt(features), vocabulary, features),
    }
    if bias:
        operands["bias"] = normal(1.0, vocabulary)
    labels = torch.randint(vocabulary, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    if rows[-1] > 2:
        labels[..., -2], labels[..., -1] = 0, vocabulary - 1
    return operands, labels


def skip_unless_it_may_be_kept(mode: str, dtype: torch.dtype) -> None:
    """Skip a mode that does not support a dtype."""
    if mode == "save" and dtype == torch.float16:
        pytest.skip("mode='save' does not support float16: stored exponentials overflow")


def magnitudes(operands: Operands, labels: Tensor, layouts: Any = None, **options: Any) -> dict[str, float]:
    """Return the size of the terms of each gradient's sums without their signs: they cancel, but their rounding stays.

    The transform is in the gradient of the logits, and a reduction of sequences in its scale.
    """
    laid = {name: (layouts or {}).get(name, lambda value: value)(value.double()) for name, value in operands.items()}
    hidden, weight = laid["hidden"], laid["weight"]
    logits = hidden @ weight.T + laid.get("bias", 0.0)
    if "cu_seqlens" in options and logits.dim() == 3:
        labels = labels.view(logits.shape[:-1])
    function = reference.sequence_logprobs if {"reduction", "cu_seqlens", "ld_alpha"} & options.keys() else None
    kept = {name: value for name, value in options.items() if name not in ("mode", "chunk_rows", "filter_eps", "stats")}
    stats = tuple(name for name in options.get("stats", ()) if name == "entropy")
    dz = run_logits(function or reference.token_logprobs, logits, labels, stats=stats, **kept).flatten(0, -2).abs()
    if stats:
        # An entropy's p (log p + H) cancels too, near the row's mass, before it is multiplied.
        scale, temperature = kept.get("logit_scale", 1.0), kept.get("temperature", 1.0)
        transform = Transform.of(scale, temperature, kept.get("softcap"))
        z = transform.rate * transform.u(logits)
        log_p = z.detach().nan_to_num(0.0, 0.0, 0.0).log_softmax(-1).flatten(0, -2)
        entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
        dz = dz + log_p.exp() * (entropy - log_p)
    rows = hidden.reshape(-1, hidden.shape[-1]).nan_to_num(0.0, 0.0, 0.0).abs()
    sums = {"dhidden": dz @ weight.abs(), "dweight": dz.T @ rows, "dbias": dz.sum(0)}
    return {name: value.max().item() if value.numel() else 0.0 for name, value in sums.items()}


def run_logits(function: Callable[..., Any], logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Return the gradient of float64 logits for the incoming gradients of `run`."""
    operands = {"hidden": logits, "weight": logits.new_ones(1, 1)}
    return run(lambda z, _, y, __, **kept: function(z, y, **kept), operands, labels, frozen=("weight",), **options)[
        "dhidden"
    ]


def run(
    function: Callable[..., Any],
    operands: Operands,
    labels: Tensor,
    dtype: torch.dtype | None = None,
    layouts: dict[str, Callable[[Tensor], Tensor]] | None = None,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """Return the outputs of a call by name, and the gradient of every operand that is not frozen, as `d` and its name.

    The incoming gradients of `logprobs` and `entropy` are the same float32 numbers for every dtype.
    """
    leaves = {
        name: value.to(dtype or value.dtype, copy=True).requires_grad_(name not in frozen)
        for name, value in operands.items()
    }
    laid = {name: (layouts or {}).get(name, lambda value: value)(leaf) for name, leaf in leaves.items()}
    result = function(laid["hidden"], laid["weight"], labels, laid.get("bias"), **options)
    outputs = result._asdict() if isinstance(result, tuple) else {"logprobs": result}
    generator = torch.Generator().manual_seed(7)
    differentiable = [outputs[name] for name in ("logprobs", "entropy") if name in outputs]
    incoming = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in differentiable]
    torch.autograd.backward(differentiable, incoming)
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            outputs[f"d{name}"] = leaf.grad
    return {name: value.detach() for name, value in outputs.items()}


def assert_matches_reference(name: str, operands: Operands, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    """Hold `fastpref.<name>` against `fastpref.reference.<name>` on the same operands; return the former's results."""
    definition = getattr(reference, name)
    truth = run(definition, operands, labels, torch.float64, **options)
    eager = run(definition, operands, labels, **options)
    ours = run(getattr(fastpref, name), operands, labels, **options)
    assert ours.keys() == truth.keys()
    summed = magnitudes(operands, labels, **options)
    dtype = operands["hidden"].dtype
    bound = BOUNDS[dtype]
    for field, value in ours.items():
        if field.startswith("d") and field != "dropped_mass":
            assert_accurate(value, eager[field], truth[field], field, summed=summed[field])
            continue
        assert value.shape == truth[field].shape
        assert value.dtype == eager[field].dtype
        if not value.is_floating_point():
            assert torch.equal(value, truth[field]), field
            continue
        # Beside the absolute bound, the rounding of a float32 as large as the answer.
        relative = 1e-5 if name == NAMES[1] and field == "logprobs" and dtype != torch.float64 else bound / 10
        torch.testing.assert_close(value.double(), truth[field], atol=bound, rtol=min(relative, 1e-5))
    assert not (ours["logprobs"] > 0).any()
    return ours


LAYOUTS: dict[str, tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    # name: the operand, the base's shape, and the view of it that has shape (3, 5, 9), (37, 9) or (37,)
    "hidden, transposed batch and time": ("hidden", (5, 3, 9), lambda base: base.transpose(0, 1)),
    "hidden, transposed features": ("hidden", (3, 9, 5), lambda base: base.transpose(1, 2)),
    "hidden, padded features": ("hidden", (3, 5, 16), lambda base: base[..., 3:12]),
    "hidden, every second time": ("hidden", (3, 10, 9), lambda base: base[:, ::2]),
    "hidden, every second feature": ("hidden", (3, 5, 18), lambda base: base[..., ::2]),
    "hidden, expanded batch": ("hidden", (1, 5, 9), lambda base: base.expand(3, 5, 9)),
    "hidden, expanded features": ("hidden", (3, 5, 1), lambda base: base.expand(3, 5, 9)),
    "weight, transposed": ("weight", (9, 37), lambda base: base.T),
    "weight, padded features": ("weight", (37, 16), lambda base: base[:, 3:12]),
    "weight, every second row": ("weight", (74, 9), lambda base: base[::2]),
    "weight, every second feature": ("weight", (37, 18), lambda base: base[:, ::2]),
    "weight, expanded rows": ("weight", (1, 9), lambda base: base.expand(37, 9)),
    "weight, expanded features": ("weight", (37, 1), lambda base: base.expand(37, 9)),
    "bias, every second entry": ("bias", (74,), lambda base: base[::2]),
    "bias, expanded": ("bias", (1,), lambda base: base.expand(37)),
}

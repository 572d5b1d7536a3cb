"""Assertions by the rule of `fastpref.testing.accuracy`: `error(fastpref) ≤ 2 · error(eager) + 4 ulp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.testing.accuracy import judge, mean_magnitude
from fastpref_kernels.contract import LINEAR_STATISTICS, STATISTICS

ALL_STATS = tuple(STATISTICS)
EVERY_STATISTIC = sum(LINEAR_STATISTICS.values())  # as an operator's bits
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def assert_accurate(
    ours: Tensor, eager: Tensor, truth: Tensor, name: str = "value", *, summed: float = 0.0, slack: float = 1.0
) -> None:
    """Apply the accuracy rule. Infinities and NaN must be the same in `ours` as in `truth`.

    Args:
        ours: the tensor to judge.
        eager: the result of eager PyTorch in the same dtype.
        truth: the result in float64.
        name: the name of the tensor in the message.
        summed: the magnitude of the terms of a sum that cancels; a ulp is then taken at this magnitude.
        slack: a factor on the allowance.
    """
    fault = judge(ours, eager, truth, summed=summed, slack=slack).fault
    assert fault is None, f"{name}: {fault}"


def run(
    function: Callable[..., Any],
    base: Tensor,
    labels: Tensor,
    layout: Callable[[Tensor], Tensor],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Call a log-prob function on `layout(base)`; return its outputs by name, and the gradient of `base` as `gradient`.

    The incoming gradients of `logprobs` and `entropy` are the same float32 numbers for every dtype.
    """
    leaf = base.detach().clone().requires_grad_()
    result = function(layout(leaf), labels, **options)
    outputs = result._asdict() if isinstance(result, tuple) else {"logprobs": result}
    generator = torch.Generator().manual_seed(7)
    differentiable = [outputs[name] for name in ("logprobs", "entropy") if name in outputs]
    incoming = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in differentiable]
    torch.autograd.backward(differentiable, incoming)
    assert leaf.grad is not None
    return {**outputs, "gradient": leaf.grad}


def assert_matches_reference(
    name: str,
    base: Tensor,
    labels: Tensor,
    layout: Callable[[Tensor], Tensor] = lambda logits: logits,
    *,
    slack: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """Judge the outputs and the gradient of `fastpref.<name>` by those of `fastpref.reference.<name>`; return them.

    A call with `stats` is also judged without them, because a kernel may take another path then.
    """
    if options.get("stats"):
        assert_matches_reference(name, base, labels, layout, slack=slack, **{**options, "stats": ()})
    definition = getattr(reference, name)
    truth = run(definition, base.double(), labels, layout, options)
    eager = run(definition, base, labels, layout, options)
    ours = run(getattr(fastpref, name), base, labels, layout, options)
    assert ours.keys() == truth.keys()
    for field, value in ours.items():
        summed = magnitude(layout(base.double()), options) if field == "mean_logits" else 0.0
        assert_accurate(value, eager[field], truth[field], field, summed=summed, slack=slack)
    return ours


def magnitude(logits: Tensor, options: dict[str, Any]) -> float:
    """Return the largest mean |z| of a row, the `summed` of a mean logit, whose terms cancel."""
    transform = ("temperature", "logit_scale", "softcap")
    return mean_magnitude(logits, **{name: options[name] for name in transform if name in options})

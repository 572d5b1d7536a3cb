"""What tests assert by the rule of `fastpref.cli.check.allowance`: `error(ours) ≤ 2 · error(eager) + 4 ulp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.cli.check.allowance import judge, mean_magnitude

ALL_STATS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def assert_accurate(
    ours: Tensor, eager: Tensor, truth: Tensor, name: str = "value", *, summed: float = 0.0, slack: float = 1.0
) -> None:
    """Apply the rule; an infinity or NaN of the truth must be the same in ours, and none may be ours alone.

    Args:
        ours: what is judged.
        eager: the same from eager PyTorch in the same dtype.
        truth: the same in float64.
        name: for the message.
        summed: where terms cancel, their magnitude: a ulp is then theirs.
        slack: multiplies what is allowed.
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
    """Call a log-prob function on `layout(base)`: its outputs by name, and `gradient`, that of `base`.

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
    """Hold `fastpref.<name>` against `fastpref.reference.<name>`: every output and the gradient. Returns ours.

    With `stats`, also without them: a kernel that has none to make may go another way.
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
    """The largest mean |z| of a row: what the terms of a mean logit, which cancel, are measured by."""
    transform = ("temperature", "logit_scale", "softcap")
    return mean_magnitude(logits, **{name: options[name] for name in transform if name in options})

"""The one rule every result is judged by: what eager PyTorch loses in a dtype sets what we may lose in it.

    error(ours) ≤ 2 · error(eager) + 4 ulp

Both errors are against float64 on the same, already rounded, inputs: the largest absolute difference over the tensor. A
ulp is the spacing of the output's dtype at the truth's largest magnitude. Eager is the reference at the inputs' own
dtype, which is float32 `log_softmax` and `gather`, and the gradient rounded to the logits' dtype.

In float64 eager is the truth itself, which is rounded too, so its error cannot be seen: there we may lose 16 ulp of the
truth's largest magnitude, or of 1 where that is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.reference.logprobs import transform_logits

ALL_STATS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The spacing of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    if magnitude < info.smallest_normal:
        return info.smallest_normal * info.eps
    return info.eps * 2.0 ** math.floor(math.log2(magnitude))


def error(values: Tensor, truth: Tensor) -> float:
    """The largest absolute difference where both are finite."""
    values, truth = values.detach().double(), truth.detach().double()
    both = values.isfinite() & truth.isfinite()
    return (values - truth)[both].abs().max().item() if both.any() else 0.0


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
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, wanted {eager.dtype}"
    ours, eager, truth = ours.detach(), eager.detach(), truth.detach()
    if not ours.is_floating_point():
        assert torch.equal(ours, truth), f"{name}: {ours} where {truth} is right"
        return
    finite = truth.isfinite()
    torch.testing.assert_close(ours[~finite].double(), truth[~finite].double(), equal_nan=True, rtol=0, atol=0)
    assert ours[finite].isfinite().all(), f"{name}: {(~ours[finite].isfinite()).sum()} values are not finite"
    if not finite.any():
        return
    magnitude = max(truth[finite].abs().max().item(), summed)
    found, peer = error(ours, truth), error(eager, truth)
    if ours.dtype == torch.float64:
        spacing, ulps = ulp(ours.dtype, max(magnitude, 1.0)), 16
    else:
        spacing, ulps = ulp(ours.dtype, magnitude), 4
    assert found <= slack * (2 * peer + ulps * spacing), (
        f"{name}: error {found:.3e}, which is {found / spacing:.1f} ulp; eager's is {peer / spacing:.1f} ulp"
    )


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
    scalars = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None}
    z = transform_logits(logits, **{name: options.get(name, default) for name, default in scalars.items()})
    rows = z.abs().mean(-1)
    return rows[rows.isfinite()].max().item() if rows.isfinite().any() else 0.0

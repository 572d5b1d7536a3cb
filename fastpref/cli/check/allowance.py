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
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.reference.logprobs import transform_logits


class Verdict(NamedTuple):
    """What the rule says of one tensor.

    Attributes:
        error: the largest absolute difference from the truth, None where there is none to take.
        allowance: what it may be.
        fault: what is wrong, or None.
    """

    error: float | None = None
    allowance: float | None = None
    fault: str | None = None


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


def judge(ours: Tensor, eager: Tensor, truth: Tensor, *, summed: float = 0.0, slack: float = 1.0) -> Verdict:
    """Apply the rule; an infinity or NaN of the truth must be the same in ours, and none may be ours alone.

    Args:
        ours: what is judged.
        eager: the same from eager PyTorch in the same dtype.
        truth: the same in float64.
        summed: where terms cancel, their magnitude: a ulp is then theirs.
        slack: multiplies what is allowed.
    """
    if ours.shape != truth.shape:
        return Verdict(fault=f"shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}")
    if ours.dtype != eager.dtype:
        return Verdict(fault=f"{ours.dtype}, wanted {eager.dtype}")
    ours, eager, truth = ours.detach(), eager.detach(), truth.detach()
    if not ours.is_floating_point():
        return Verdict(fault=None if torch.equal(ours, truth) else f"{ours} where {truth} is right")
    finite = truth.isfinite()
    if not torch.allclose(ours[~finite].double(), truth[~finite].double(), rtol=0, atol=0, equal_nan=True):
        return Verdict(fault=f"{ours[~finite].tolist()} where {truth[~finite].tolist()} is right")
    if not ours[finite].isfinite().all():
        return Verdict(fault=f"{(~ours[finite].isfinite()).sum()} values are not finite")
    if not finite.any():
        return Verdict()
    magnitude = max(truth[finite].abs().max().item(), summed)
    found, peer = error(ours, truth), error(eager, truth)
    if ours.dtype == torch.float64:
        spacing, ulps = ulp(ours.dtype, max(magnitude, 1.0)), 16
    else:
        spacing, ulps = ulp(ours.dtype, magnitude), 4
    allowance = slack * (2 * peer + ulps * spacing)
    fault = None
    if not found <= allowance:
        fault = f"error {found:.3e}, which is {found / spacing:.1f} ulp; eager's is {peer / spacing:.1f} ulp"
    return Verdict(found, allowance, fault)


def mean_magnitude(
    logits: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> float:
    """The largest mean |z| of a row: what the terms of a mean logit, which cancel, are measured by."""
    z = transform_logits(logits, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    rows = z.abs().mean(-1)
    return rows[rows.isfinite()].max().item() if rows.isfinite().any() else 0.0

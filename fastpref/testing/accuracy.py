"""The accuracy rule: the error of eager PyTorch in a dtype bounds the error of fastpref in that dtype.

    error(fastpref) ≤ 2 · error(eager) + 4 ulp

An error is the largest absolute difference from float64 on the same, already rounded, inputs. A ulp is the spacing of
the output's dtype at the largest magnitude of the float64 result. Eager is `fastpref.reference` in the inputs' own
dtype: it computes `log_softmax` and `gather` in float32, and rounds the gradient to the dtype of the logits.

In float64, eager is the truth itself, so its rounding error is not visible. The bound is then 16 ulp of the truth's
largest magnitude, or of 1 if that magnitude is smaller.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.reference.logprobs import transform_logits


class Verdict(NamedTuple):
    """The result of the accuracy rule for one tensor.

    Attributes:
        error: the largest absolute difference from the truth, or None if no numbers were compared.
        allowance: the largest error that the rule allows.
        fault: a message about what is wrong, or None.
    """

    error: float | None = None
    allowance: float | None = None
    fault: str | None = None


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """Return the spacing of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    if magnitude < info.smallest_normal:
        return info.smallest_normal * info.eps
    return info.eps * 2.0 ** math.floor(math.log2(magnitude))


def error(values: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference over the elements that are finite in both tensors."""
    values, truth = values.detach().double(), truth.detach().double()
    both = values.isfinite() & truth.isfinite()
    return (values - truth)[both].abs().max().item() if both.any() else 0.0


def judge(ours: Tensor, eager: Tensor, truth: Tensor, *, summed: float = 0.0, slack: float = 1.0) -> Verdict:
    """Apply the accuracy rule. Infinities and NaN must be the same in `ours` as in `truth`.

    Args:
        ours: the tensor to judge.
        eager: the result of eager PyTorch in the same dtype.
        truth: the result in float64.
        summed: the magnitude of the terms of a sum that cancels; a ulp is then taken at this magnitude.
        slack: a factor on the allowance.
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
    """Return the largest mean |z| of a row, the `summed` of a mean logit, whose terms cancel."""
    z = transform_logits(logits, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    rows = z.abs().mean(-1)
    return rows[rows.isfinite()].max().item() if rows.isfinite().any() else 0.0

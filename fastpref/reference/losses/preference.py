"""Preference losses on sequence log-probs: the definitions, which are also what runs on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref._checks import FLOATING, REDUCTIONS, check_choice, check_positive, check_same_device, check_tensor
from fastpref._results import PreferenceLoss

LOSS_TYPES = ("sigmoid",)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """(B,) -> (B,), its sum, or its mean; a mean over nothing is 0."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(losses.numel(), 1)


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, float32 at the least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def check_vectors(**named: Tensor | None) -> None:
    """Raise unless every given tensor is floating point, (B,) with one B, and on one device."""
    first_name, first = next(iter(named.items()))
    for name, value in named.items():
        if value is None:
            continue
        check_tensor(name, value, FLOATING, "a floating-point tensor (B,)")
        assert first is not None
        if value.dim() != 1 or value.shape != first.shape:
            raise ValueError(
                f"{name} must be (B,), as {first_name} is {tuple(first.shape)}; got shape {tuple(value.shape)}"
            )
        check_same_device(name, value, first_name, first)


def check_dpo(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None, *, beta: float, loss_type: str, label_smoothing: float, reduction: str,
    reference_free: bool,
) -> None:  # fmt: skip
    """Check `dpo_loss`'s arguments."""
    check_vectors(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_positive("beta", beta)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing!r}")
    if not reference_free and (ref_chosen_logps is None or ref_rejected_logps is None):
        missing = "ref_chosen_logps" if ref_chosen_logps is None else "ref_rejected_logps"
        raise ValueError(f"loss_type={loss_type!r} needs {missing}; pass it, or reference_free=True")


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    reference_free: bool = False,
) -> PreferenceLoss:
    """`fastpref.dpo_loss` in plain PyTorch."""
    check_dpo(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta,
        loss_type=loss_type, label_smoothing=label_smoothing, reduction=reduction, reference_free=reference_free,
    )  # fmt: skip
    chosen, rejected = widen(policy_chosen_logps, policy_rejected_logps)
    if not reference_free:
        assert ref_chosen_logps is not None
        assert ref_rejected_logps is not None
        chosen, rejected, ref_chosen, ref_rejected = widen(chosen, rejected, ref_chosen_logps, ref_rejected_logps)
        chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
    u = beta * (chosen - rejected)
    losses = -F.logsigmoid(u)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-u)
    return PreferenceLoss(reduce(losses, reduction), beta * chosen.detach(), beta * rejected.detach())


def implicit_reward(logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """The reward a policy implies (arXiv 2305.18290 eq. 5), up to the prompt's constant β log Z: β(logp − ref).

    Args:
        logps: log π(y|x), any shape, any floating dtype.
        ref_logps: log π_ref(y|x), of the same shape.
        beta: β > 0.

    Returns:
        Rewards of logps' shape, float32 (float64 for float64), differentiable in both.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: the shapes or devices differ, or β is not above 0.
    """
    check_tensor("logps", logps, FLOATING, "a floating-point tensor")
    check_tensor("ref_logps", ref_logps, FLOATING, "a floating-point tensor")
    if logps.shape != ref_logps.shape:
        raise ValueError(f"ref_logps must have logps' shape {tuple(logps.shape)}; got {tuple(ref_logps.shape)}")
    check_same_device("ref_logps", ref_logps, "logps", logps)
    check_positive("beta", beta)
    logps, ref_logps = widen(logps, ref_logps)
    return beta * (logps - ref_logps)

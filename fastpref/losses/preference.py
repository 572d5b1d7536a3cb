"""Preference losses on sequence log-probs, for training loops.

A (B,) tensor is too small to win anything on a CPU: there the reference formula runs. A GPU computes the loss, the
rewards and the partial derivatives in one launch, and its backward is one multiplication.
"""

from __future__ import annotations

from torch import Tensor

from fastpref._results import PreferenceLoss
from fastpref.losses._launch import fused, launch
from fastpref.reference.losses import preference as reference
from fastpref.reference.losses.preference import implicit_reward

__all__ = ["dpo_loss", "implicit_reward"]


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
    """The DPO family: loss and implicit rewards of B pairs from their summed log-probs.

    With u = β[(log π(chosen) − log π_ref(chosen)) − (log π(rejected) − log π_ref(rejected))] and ε = `label_smoothing`:

    - `sigmoid`: −(1−ε) log σ(u) − ε log σ(−u). DPO (arXiv 2305.18290, eq. 7); with ε > 0, conservative DPO.

    Args:
        policy_chosen_logps: (B,) log π(chosen|x), nats, any floating dtype; computed in float32 (float64 for float64).
        policy_rejected_logps: (B,) log π(rejected|x).
        ref_chosen_logps: (B,) log π_ref(chosen|x); may be left out with `reference_free`.
        ref_rejected_logps: (B,) log π_ref(rejected|x); likewise.
        beta: β > 0, the strength of the KL constraint.
        loss_type: one of `fastpref.losses.LOSS_TYPES`.
        label_smoothing: ε in [0, 1], the probability that a pair's label is flipped.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no pairs is 0.
        reference_free: take the reference's log-probs as 0, whether or not they are given.

    Returns:
        PreferenceLoss(loss, chosen_rewards, rejected_rewards); the rewards are detached and (B,) in every reduction.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices differ, an option is out of range, or the reference's log-probs are missing.
    """
    options = {
        "beta": beta,
        "loss_type": loss_type,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "reference_free": reference_free,
    }
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if not fused(policy_chosen_logps):
        return reference.dpo_loss(*logps, **options)
    reference.check_dpo(*logps, **options)
    if reference_free:
        logps = (*logps[:2], None, None)
    loss, chosen_rewards, rejected_rewards = launch("dpo_loss", reduction, logps, (loss_type, beta, label_smoothing))
    return PreferenceLoss(loss, chosen_rewards, rejected_rewards)

"""Modules of the preference losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref._core.loss_checks import check_vectors
from fastpref._core.preference import PreferenceOptions, resolve_pairs, resolve_preference
from fastpref.losses.preference import implicit_reward, kto_loss, pair_loss
from fastpref.nn.module import Loss, empty
from fastpref.reference.losses.reduction import reduce
from fastpref.reference.results import KTOResult, PreferenceLoss


class KTOSplit(NamedTuple):
    """The result of `KTOSplitLoss`.

    Attributes:
        loss: a scalar, or (D + U,) with `reduction="none"`, the desirable answers first. The only differentiable field.
        chosen_rewards: (D,), β(log π(y) − log π_ref(y)) of the desirable answers, detached.
        rejected_rewards: (U,), those of the others, detached.
        kl: a scalar, the reference point z, detached.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    kl: Tensor


class DPOLoss(Loss):
    """Compute `fastpref.dpo_loss`, DPO and its family (arXiv 2305.18290), which explains every option.

    Args:
        beta: β > 0, the strength of the KL constraint.
        loss_type: one of `fastpref.losses.LOSS_TYPES`, a sequence of them, or a mapping of them to their weights.
            torchtune's `RSOLoss` is "hinge", OpenRLHF's `ipo=True` is "ipo".
        loss_weights: one weight for each of a sequence of loss types. None stands for 1 each, or for the weights of the
            mapping.
        label_smoothing: ε in [0, 1], the probability that a pair's label is flipped.
        reduction: "mean", "sum" or "none". torchtune takes the mean of the result, which does not change a mean.
        length_normalize: divide log-probs by the lengths of the completions before comparing.
        margin: None, or a number: how far apart the rewards should at least be.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha".
        f_alpha: α of `f_divergence="alpha"`.
        reference_free: take the reference's log-probs as 0.
        delta: δ of `bco_pair`.
        gamma: γ of `simpo`.
        discopop_tau: τ > 0 of `discopop`.
        sft_weight: the factor of the negative log-likelihood of the chosen completions, which is added.
        sft_reduction: "token" or "sequence", the mean of that term.

    Raises:
        TypeError: an option is unknown, has a wrong type, or is a tensor.
        ValueError: an option is out of range or taken by none of the loss types.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str | Sequence[str] | Mapping[str, float] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        length_normalize: bool = False,
        margin: float | None = None,
        f_divergence: str = "reverse_kl",
        f_alpha: float = 0.5,
        reference_free: bool = False,
        delta: float = 0.0,
        gamma: float = 0.5,
        discopop_tau: float = 0.05,
        sft_weight: float = 0.0,
        sft_reduction: str = "token",
    ) -> None:
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            loss_weights=loss_weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            length_normalize=length_normalize,
            f_divergence=f_divergence,
            f_alpha=f_alpha,
            reference_free=reference_free,
            delta=delta,
            gamma=gamma,
            discopop_tau=discopop_tau,
            sft_weight=sft_weight,
            sft_reduction=sft_reduction,
            margin=margin,
        )
        resolve_preference(PreferenceOptions(**self.options))

    @property
    def is_reference_free(self) -> bool:
        """Return whether the loss needs no reference; torchtune then skips the forward of the reference model."""
        return not resolve_preference(PreferenceOptions(**self.options)).needs_reference

    def forward(
        self,
        policy_chosen_logps: Tensor | Any,
        policy_rejected_logps: Tensor | Any,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        margin: Tensor | float | None = None,
        weights: Tensor | None = None,
    ) -> PreferenceLoss:
        """Return the loss and the implicit rewards of B pairs.

        torchtune after 0.6 passes two objects in place of four tensors, one for the policy and one for the reference.
        Any object with the attributes `chosen_logps` and `rejected_logps`, like its `ChosenRejectedOutputs`, works.

        Args:
            policy_chosen_logps: (B,) log π(chosen|x), nats, any floating dtype; or the object of the policy.
            policy_rejected_logps: (B,) log π(rejected|x); or the object of the reference, which may be None, like its
                log-probs, where the loss needs no reference.
            ref_chosen_logps: (B,) log π_ref(chosen|x), where the loss needs a reference.
            ref_rejected_logps: (B,) log π_ref(rejected|x), where the loss needs a reference.
            chosen_lengths: (B,) numbers of tokens of the chosen completions, where the loss divides by them.
            rejected_lengths: (B,) numbers of tokens of the rejected completions, where the loss divides by them.
            margin: a number or (B,), floating point or integers, instead of the constructor's margin.
            weights: (B,), multiplies the losses of the pairs.

        Returns:
            PreferenceLoss(loss, chosen_rewards, rejected_rewards). The rewards are detached and (B,).

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes or devices differ, or the log-probs of the reference or the lengths are missing.
        """
        if not isinstance(policy_chosen_logps, Tensor) and hasattr(policy_chosen_logps, "chosen_logps"):
            policy, ref = policy_chosen_logps, policy_rejected_logps
            policy_chosen_logps, policy_rejected_logps = policy.chosen_logps, policy.rejected_logps
            ref_chosen_logps = getattr(ref, "chosen_logps", None)
            ref_rejected_logps = getattr(ref, "rejected_logps", None)
        options = PreferenceOptions(
            **{**self.options, "margin": self.options["margin"] if margin is None else margin},
            weights=weights,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
        logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        return pair_loss(logps, resolve_pairs(logps, options))


class KTOLoss(Loss):
    """Compute `fastpref.kto_loss`, KTO (arXiv 2402.01306).

    Args:
        beta: β > 0.
        desirable_weight: λ_d ≥ 0.
        undesirable_weight: λ_u ≥ 0.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an option is unknown, has a wrong type, or is a tensor.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight, reduction=reduction
        )
        kto_loss(empty(), empty(), empty(dtype=torch.bool), kl=0.0, **self.options)

    def forward(self, policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, *, kl: Tensor | float) -> KTOResult:
        """Return the loss and the implicit rewards of B answers.

        Args:
            policy_logps: (B,) log π(y|x), nats, any floating dtype.
            ref_logps: (B,) log π_ref(y|x).
            desirable: (B,) bool.
            kl: estimates of KL(π‖π_ref), a number, () or (K,).

        Returns:
            KTOResult(loss, rewards). The rewards are detached and (B,).

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: shapes or devices differ.
        """
        return kto_loss(policy_logps, ref_logps, desirable, kl=kl, **self.options)


class KTOSplitLoss(KTOLoss):
    """Compute `KTOLoss` of separate tensors of desirable and undesirable answers.

    OpenRLHF's trainer calls its loss in this way, up to version 0.9.5.

    Args:
        beta: β > 0.
        desirable_weight: λ_d ≥ 0.
        undesirable_weight: λ_u ≥ 0.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an option is unknown, has a wrong type, or is a tensor.
        ValueError: an option is out of range.
    """

    def forward(  # type: ignore[override]
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        policy_kl_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        ref_kl_logps: Tensor,
    ) -> KTOSplit:
        """Return the loss and the implicit rewards of D desirable and U undesirable answers.

        Where `torch.distributed` is initialized, the mean of the estimates is averaged over the ranks of its default
        group.

        Args:
            policy_chosen_logps: (D,) log π(y|x) of the desirable answers, nats, any floating dtype.
            policy_rejected_logps: (U,) log π(y|x) of the others; D or U may be 0.
            policy_kl_logps: (K,) log π of prompts with the answers to others. KL(π‖π_ref) is estimated by their mean
                log-ratio.
            ref_chosen_logps: (D,) log π_ref of the desirable answers.
            ref_rejected_logps: (U,) log π_ref of the others.
            ref_kl_logps: (K,) log π_ref of the prompts with the answers to others.

        Returns:
            KTOSplit(loss, chosen_rewards, rejected_rewards, kl). All fields but the loss are detached.

        Raises:
            TypeError: a tensor is not floating point.
            ValueError: shapes or devices differ.
        """
        check_vectors(policy_chosen_logps=policy_chosen_logps, ref_chosen_logps=ref_chosen_logps)
        check_vectors(policy_rejected_logps=policy_rejected_logps, ref_rejected_logps=ref_rejected_logps)
        check_vectors(policy_kl_logps=policy_kl_logps, ref_kl_logps=ref_kl_logps)
        kl = reduce(implicit_reward(policy_kl_logps.detach(), ref_kl_logps.detach(), beta=1.0), "mean")
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(kl)
            kl = kl / dist.get_world_size()
        count = policy_chosen_logps.shape[0]
        policy_logps = torch.cat((policy_chosen_logps, policy_rejected_logps))
        ref_logps = torch.cat((ref_chosen_logps, ref_rejected_logps))
        desirable = torch.arange(policy_logps.shape[0], device=policy_logps.device) < count
        loss, rewards = kto_loss(policy_logps, ref_logps, desirable, kl=kl, **self.options)
        return KTOSplit(loss, rewards[:count], rewards[count:], kl.clamp(min=0))

"""The losses as modules, for trainers that hold a loss as an object: options at construction, tensors at the call.

A module is its function with keywords bound: `DPOLoss(beta=0.2)(*logps)` is `dpo_loss(*logps, beta=0.2)`. The keywords
are the function's own, and are checked by it at construction. No module has parameters or state.

`trainer.loss_fn = fastpref.nn.DPOLoss(beta=0.2)` serves OpenRLHF, and `_component_: fastpref.nn.DPOLoss` a torchtune
config: both call, and unpack what comes back, as they do with their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpref._checks import check_finite, check_int, describe
from fastpref._results import KTOResult, PreferenceLoss
from fastpref.losses.preference import dpo_loss, implicit_reward, kto_loss
from fastpref.losses.reward import best_of_k_loss, pairwise_reward_loss, plackett_luce_loss, ranking_loss
from fastpref.losses.rlhf import ppo_policy_loss, ppo_value_loss
from fastpref.reference.losses.preference import check_vectors, needs_reference, reduce, weighted_types

__all__ = [
    "BestOfKLoss",
    "DPOLoss",
    "KTOLoss",
    "KTOSplitLoss",
    "PPOPolicyLoss",
    "PPOValueLoss",
    "PairwiseRewardLoss",
    "PlackettLuceLoss",
    "RankingLoss",
]


class KTOSplit(NamedTuple):
    """What `KTOSplitLoss` returns.

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


class PPOPolicy(NamedTuple):
    """What `nn.PPOPolicyLoss` returns, in the order in which OpenRLHF unpacks it.

    Attributes:
        loss: a scalar, the only differentiable field.
        clip_fraction: a scalar, the share of this batch's tokens where the clipped branch is the larger.
        approx_kl: a scalar, the mean over this batch's tokens of ½(log π − log π_old)², in nats.
        rollout_kl: None; OpenRLHF has its correction's divergence here.
        filtered_fraction: None; and here what the correction dropped.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    rollout_kl: None = None
    filtered_fraction: None = None


class _Loss(nn.Module):
    """A loss with its options fixed."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{name} must not be a tensor at construction, but at the call; got {describe(value)}")
        self.options = options

    def extra_repr(self) -> str:
        """The options that are not their defaults."""
        defaults = inspect.signature(type(self)).parameters
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v != defaults[k].default)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """No elements: what a loss is constructed with, so that its function refuses what it would refuse later."""
    return torch.empty(0, *shape, dtype=dtype, device="cpu")


class DPOLoss(_Loss):
    """The DPO family (arXiv 2305.18290) as a module over `fastpref.dpo_loss`, which has every option's meaning.

    Args:
        beta: β > 0, the strength of the KL constraint.
        loss_type: one of `fastpref.losses.LOSS_TYPES`, a sequence of them, or a mapping of them to their weights.
            torchtune's `RSOLoss` is "hinge", OpenRLHF's `ipo=True` is "ipo".
        loss_weights: one weight for each of a sequence of loss types; None: 1 each, or those of the mapping.
        label_smoothing: ε in [0, 1], the probability that a pair's label is flipped.
        reduction: "mean", "sum" or "none". torchtune takes the mean of what it gets, which the mean leaves as it is.
        length_normalize: divide what is compared by the completions' lengths.
        margin: None, or a number: how far apart the rewards should at least be.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha".
        f_alpha: α of `f_divergence="alpha"`.
        reference_free: take the reference's log-probs as 0.
        delta: δ of `bco_pair`.
        gamma: γ of `simpo`.
        discopop_tau: τ > 0 of `discopop`.
        sft_weight: adds this much of the chosen completions' negative log-likelihood.
        sft_reduction: "token" or "sequence", of that term.

    Raises:
        TypeError: an unknown option, one of a wrong type, or a tensor.
        ValueError: an option is out of range or has no place in any of the loss types.
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
            beta=beta, loss_type=loss_type, loss_weights=loss_weights, label_smoothing=label_smoothing,
            reduction=reduction, length_normalize=length_normalize, margin=margin, f_divergence=f_divergence,
            f_alpha=f_alpha, reference_free=reference_free, delta=delta, gamma=gamma, discopop_tau=discopop_tau,
            sft_weight=sft_weight, sft_reduction=sft_reduction,
        )  # fmt: skip
        x = _empty()
        self.forward(x, x, x, x, chosen_lengths=x, rejected_lengths=x)

    @property
    def is_reference_free(self) -> bool:
        """Whether no reference is needed: torchtune then leaves its forward out."""
        types = weighted_types(self.options["loss_type"], self.options["loss_weights"])
        return not needs_reference(types, self.options["reference_free"])

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
        """The loss and implicit rewards of B pairs.

        torchtune after 0.6 passes two objects, the policy's and the reference's, in place of four tensors: what has
        attributes `chosen_logps` and `rejected_logps`, as its `ChosenRejectedOutputs`, is taken for them.

        Args:
            policy_chosen_logps: (B,) log π(chosen|x), nats, any floating dtype; or the policy's object.
            policy_rejected_logps: (B,) log π(rejected|x); or the reference's object; it or its log-probs may be
                None where the loss has no reference.
            ref_chosen_logps: (B,) log π_ref(chosen|x), where the loss has a reference.
            ref_rejected_logps: (B,) log π_ref(rejected|x), likewise.
            chosen_lengths: (B,) numbers of the chosen completions' tokens, for what divides by them.
            rejected_lengths: (B,) numbers of the rejected completions' tokens, likewise.
            margin: a number or (B,), integers too, in the place of the constructor's.
            weights: (B,), multiplies the pairs' losses.

        Returns:
            PreferenceLoss(loss, chosen_rewards, rejected_rewards); all but the loss detached and (B,).

        Raises:
            TypeError: a tensor of a wrong dtype.
            ValueError: shapes or devices differ, or the reference's log-probs or the lengths are missing.
        """
        if not isinstance(policy_chosen_logps, Tensor) and hasattr(policy_chosen_logps, "chosen_logps"):
            policy, ref = policy_chosen_logps, policy_rejected_logps
            policy_chosen_logps, policy_rejected_logps = policy.chosen_logps, policy.rejected_logps
            ref_chosen_logps = getattr(ref, "chosen_logps", None)
            ref_rejected_logps = getattr(ref, "rejected_logps", None)
        options = {**self.options, "margin": self.options["margin"] if margin is None else margin}
        return dpo_loss(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
            chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, weights=weights, **options,
        )  # fmt: skip


class KTOLoss(_Loss):
    """KTO (arXiv 2402.01306) as a module over `fastpref.kto_loss`.

    Args:
        beta: β > 0.
        desirable_weight: λ_d ≥ 0.
        undesirable_weight: λ_u ≥ 0.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an unknown option, one of a wrong type, or a tensor.
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
        kto_loss(_empty(), _empty(), _empty(dtype=torch.bool), kl=0.0, **self.options)

    def forward(self, policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, *, kl: Tensor | float) -> KTOResult:
        """The loss and implicit rewards of B answers.

        Args:
            policy_logps: (B,) log π(y|x), nats, any floating dtype.
            ref_logps: (B,) log π_ref(y|x).
            desirable: (B,) bool.
            kl: estimates of KL(π‖π_ref), a number, () or (K,).

        Returns:
            The function's KTOResult(loss, rewards); the rewards detached and (B,).

        Raises:
            TypeError: a tensor of a wrong dtype.
            ValueError: shapes or devices differ.
        """
        return kto_loss(policy_logps, ref_logps, desirable, kl=kl, **self.options)


class KTOSplitLoss(KTOLoss):
    """`KTOLoss` of desirable and undesirable answers in tensors of their own: the call of OpenRLHF's trainer, to 0.9.5.

    Args:
        beta: β > 0.
        desirable_weight: λ_d ≥ 0.
        undesirable_weight: λ_u ≥ 0.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an unknown option, one of a wrong type, or a tensor.
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
        """The loss and implicit rewards of D desirable and U undesirable answers.

        Where `torch.distributed` runs, the estimates' mean is averaged over the ranks of its default group.

        Args:
            policy_chosen_logps: (D,) log π(y|x) of the desirable answers, nats, any floating dtype.
            policy_rejected_logps: (U,) log π(y|x) of the others; D or U may be 0.
            policy_kl_logps: (K,) log π of prompts with others' answers, whose mean log-ratio estimates KL(π‖π_ref).
            ref_chosen_logps: (D,) log π_ref, as the policy's.
            ref_rejected_logps: (U,) likewise.
            ref_kl_logps: (K,) likewise.

        Returns:
            (loss, chosen_rewards, rejected_rewards, kl), all but the loss detached.

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


class PairwiseRewardLoss(_Loss):
    """A reward model's loss of pairs (arXiv 2009.01325) as a module over `fastpref.pairwise_reward_loss`.

    In the place of OpenRLHF's `PairWiseLoss`, and of its `LogExpLoss`, which is the same function of the two rewards.

    Args:
        margin: None, or a number: how far apart a pair should at least be.
        center_weight: c ≥ 0, the pull of a pair's mean reward towards 0.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an unknown option, one of a wrong type, or a tensor.
        ValueError: an option is out of range.
    """

    def __init__(self, *, margin: float | None = None, center_weight: float = 0.0, reduction: str = "mean") -> None:
        super().__init__(margin=margin, center_weight=center_weight, reduction=reduction)
        self.forward(_empty(), _empty())

    def forward(self, chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None) -> Tensor:
        """The loss of B pairs.

        Args:
            chosen: (B,) rewards of the preferred answers, any floating dtype.
            rejected: (B,) rewards of the others.
            margin: a number or (B,), integers too, in the place of the constructor's.

        Returns:
            The loss, a scalar, or (B,) with "none".

        Raises:
            TypeError: a tensor of a wrong dtype.
            ValueError: shapes or devices differ.
        """
        options = {**self.options, "margin": self.options["margin"] if margin is None else margin}
        return pairwise_reward_loss(chosen, rejected, **options)


class BestOfKLoss(_Loss):
    """The best of K answers (arXiv 1909.08593) as a module over `fastpref.best_of_k_loss`.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an unknown option, or one of a wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.forward(_empty(2), _empty(dtype=torch.long))

    def forward(self, rewards: Tensor, best: Tensor) -> Tensor:
        """The loss of B prompts.

        Args:
            rewards: (B, K), any floating dtype.
            best: (B,) int64 or int32, the index of each prompt's best answer.

        Returns:
            The loss, a scalar, or (B,) with "none".

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes or devices differ.
            IndexError: `best` is outside [0, K); on a CPU, outside of `torch.compile`.
        """
        return best_of_k_loss(rewards, best, **self.options)


class RankingLoss(_Loss):
    """Every pair of a ranking (arXiv 2203.02155) as a module over `fastpref.ranking_loss`.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an unknown option, or one of a wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.forward(_empty(2), _empty(2, dtype=torch.long))

    def forward(self, rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss of B prompts.

        Args:
            rewards: (B, K), K from 2 to 64, any floating dtype; implicit rewards make it K-way DPO.
            ranks: (B, K) int64 or int32, 0 the best; equal ranks are ties.
            mask: (B, K) bool, True where an answer counts; None counts all.

        Returns:
            The loss, a scalar, or (B,) with "none".

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes or devices differ, or K is out of range.
        """
        return ranking_loss(rewards, ranks, mask=mask, **self.options)


class PlackettLuceLoss(_Loss):
    """A ranking as a whole (arXiv 2305.18290, appendix A.3) as a module over `fastpref.plackett_luce_loss`.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: an unknown option, or one of a wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.forward(_empty(2), _empty(2, dtype=torch.long))

    def forward(self, rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss of B prompts.

        Args:
            rewards: (B, K), K up to 64, any floating dtype; implicit rewards make it K-way DPO.
            ranks: (B, K) int64 or int32, a smaller one better, no two alike among the answers that count.
            mask: (B, K) bool, True where an answer counts; None counts all.

        Returns:
            The loss, a scalar, or (B,) with "none".

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes or devices differ, K is out of range, or, on a CPU and outside of `torch.compile`, ranks
                tie among answers that count.
        """
        return plackett_luce_loss(rewards, ranks, mask=mask, **self.options)


def bool_mask(mask: Any, like: Any) -> Any:
    """Return OpenRLHF's mask as bool: None is all of `like`, and a number that is not 0 is True.

    What is no tensor is returned as it is, for the loss to refuse by name.
    """
    if mask is None and isinstance(like, Tensor):
        return torch.ones_like(like, dtype=torch.bool)
    return mask.bool() if isinstance(mask, Tensor) else mask


class _PPOLoss(_Loss):
    """A clipped loss of tokens, whose mean may be over a whole step's, on all ranks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        x = _empty(1)
        self.forward(x, x, x)

    def _denominator(
        self, dp_size: int, batch_num_tokens: Tensor | float | None, global_batch_size: Tensor | float | None
    ) -> Tensor | float | None:
        dp_size = check_int("dp_size", dp_size, least=1)
        counts = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
        for name, count in counts.items():
            if count is not None and not isinstance(count, Tensor):
                counts[name] = check_finite(name, count, least=0.0)
        total = counts["batch_num_tokens" if self.options["reduction"] == "token" else "global_batch_size"]
        return None if total is None else total / dp_size


class PPOPolicyLoss(_PPOLoss):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) as a module over `fastpref.ppo_policy_loss`.

    It takes the place of OpenRLHF's `PolicyLoss` (`actor_loss_fn`), is called as that is, and returns as many values in
    the same order, as of 0.11.2. Of that one's options it has the clips and the reduction.

    Args:
        clip: how far from 1 the ratio may be: a number above 0 for both sides, or a pair (low, high) of numbers that
            are 0 or more and not both 0.
        dual_clip: None, or a number above 1, which bounds the ratio where an advantage is below 0 (arXiv 1912.09729).
        reduction: "token" for the mean over all tokens, "sequence" for the mean over sequences of each one's own mean.

    Raises:
        TypeError: an unknown option, an option of a wrong type, or a tensor.
        ValueError: an option is out of range.
    """

    def __init__(
        self, *, clip: float | Sequence[float] = 0.2, dual_clip: float | None = None, reduction: str = "token"
    ) -> None:
        super().__init__(clip=clip, dual_clip=dual_clip, reduction=reduction)

    def forward(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> PPOPolicy:
        """The loss of a batch's tokens.

        Args:
            logps: (B, T), log π of the sampled tokens, nats, any floating dtype.
            old_logps: (B, T), the same under the policy that sampled them. Carries no gradient.
            advantages: (B, T). Carries no gradient.
            action_mask: (B, T) bool or integers, not 0 where a token counts; None counts all.
            rollout_log_probs: not used, as by OpenRLHF without a correction of the rollout's log-probs.
            dp_size: the ranks over which gradients are averaged.
            batch_num_tokens: None, or what divides the sum over tokens, of all ranks; a number or ().
            global_batch_size: the same of "sequence": the number of sequences.

        Returns:
            (loss, clip_fraction, approx_kl, None, None), scalars.

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes or devices differ.
        """
        mask = bool_mask(action_mask, logps)
        denominator = self._denominator(dp_size, batch_num_tokens, global_batch_size)
        result = reported = ppo_policy_loss(logps, old_logps, advantages, mask, denominator=denominator, **self.options)
        # Over this batch's own tokens, whatever divides the loss: OpenRLHF weights what it logs by their number.
        if denominator is not None or self.options["reduction"] != "token":
            with torch.no_grad():
                options = {**self.options, "reduction": "token"}
                reported = ppo_policy_loss(logps, old_logps, advantages, mask, **options)
        return PPOPolicy(result.loss, reported.clip_fraction, reported.approx_kl)


class PPOValueLoss(_PPOLoss):
    """PPO's clipped value loss (arXiv 1909.08593) as a module over `fastpref.ppo_value_loss`.

    In the place of OpenRLHF's `ValueLoss` (`critic_loss_fn`), with its call, whose result is a tensor.

    Args:
        clip: how far a value may move from its old one, above 0, in the rewards' units.
        reduction: as in `PPOPolicyLoss`.

    Raises:
        TypeError: an unknown option, an option of a wrong type, or a tensor.
        ValueError: an option is out of range.
    """

    def __init__(self, *, clip: float = 0.2, reduction: str = "token") -> None:
        super().__init__(clip=clip, reduction=reduction)

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of a batch's tokens.

        Args:
            values: (B, T), the value head's, any floating dtype.
            old_values: (B, T), those when the tokens were sampled. Carries no gradient.
            returns: (B, T), as `gae` gives them. Carries no gradient.
            action_mask: as in `PPOPolicyLoss`, like every argument after it.
            dp_size: the ranks over which gradients are averaged.
            batch_num_tokens: what divides the sum over tokens.
            global_batch_size: the same of "sequence".

        Returns:
            The loss, a scalar.

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes or devices differ.
        """
        denominator = self._denominator(dp_size, batch_num_tokens, global_batch_size)
        mask = bool_mask(action_mask, values)
        return ppo_value_loss(values, old_values, returns, mask, denominator=denominator, **self.options).loss

"""OpenRLHF's scoring, losses and advantages on fastpref, under OpenRLHF's names and signatures: those of 0.11.2.

`patch()` makes its actors score through `token_logprobs`, log-probs and entropy from logits of which no copy is made.
The losses are for its trainers' attributes: `trainer.loss_fn = DPOLoss(beta)`. Its `compute_approx_kl`,
`compute_reward` and `masked_mean` are a few operations on (B, T) tensors and stay its own; for the `KTOLoss` that it
had to 0.9.5 there is `fastpref.nn.KTOSplitLoss`.

Not run end to end: OpenRLHF needs DeepSpeed, Ray and vLLM on a GPU. Tests hold every function against its formula in
plain PyTorch, and `patch` against modules that stand in for OpenRLHF's; the functions of 0.11.2 itself but
`get_advantages_and_returns`, and its actor's forward under `patch`, agreed on a CPU. Ray's workers are processes of
their own: `patch` belongs in each of them, by `worker_process_setup_hook` of Ray's `runtime_env`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastpref import nn as losses
from fastpref._results import PreferenceLoss
from fastpref.integrations._seam import Seam
from fastpref.logprobs import token_logprobs
from fastpref.losses.rlhf import gae
from fastpref.reference.losses.rlhf import bounded_log_ratio, check_tokens, counted, masked_mean

SUPPORTED = ">=0.9.3,<0.12"
"""The versions of OpenRLHF whose scoring is known."""


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """`token_logprobs` of aligned logits and labels. The logits are left as they are: OpenRLHF's divides them in place.

    Args:
        logits: (B, T, V) or (T, V), any floating dtype.
        labels: (B, T) or (T,), int64 or int32.
        temperature: divides the logits, above 0.

    Returns:
        labels' shape, float32 (float64 for float64), where OpenRLHF's has the logits' dtype.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, device or temperature.
        IndexError: a label outside [0, V), on a CPU.
    """
    return token_logprobs(logits, labels, shift=False, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of every row of logits (B, T, V) or (T, V), nats, differentiable; float32 (float64 for float64)."""
    labels = logits.new_zeros(logits.shape[:-1], dtype=torch.long)  # any: an entropy has none
    return token_logprobs(logits, labels, shift=False, stats=("entropy",)).entropy


def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """`fastpref.gae` with OpenRLHF's meaning of a mask: a token that does not count is a step of value and reward 0.

    `gae` with that mask would step over it. A method in OpenRLHF, of its experience maker.

    Args:
        values: (B, T), any floating dtype.
        rewards: (B, T), in the same units.
        action_mask: (B, T) bool or numbers, 0 where a token does not count; None counts all.
        gamma: γ in [0, 1].
        lambd: λ in [0, 1].

    Returns:
        (advantages, returns), (B, T) each, float32 (float64 for float64), detached.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices differ, or γ or λ is not in [0, 1].
    """
    if action_mask is not None:
        values, rewards = (x.masked_fill(action_mask == 0, 0.0) for x in (values, rewards))
    return gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), gamma=gamma, lam=lambd)


class DPOLoss(nn.Module):
    """`fastpref.nn.DPOLoss` (arXiv 2305.18290; with `ipo` 2310.12036), which refuses `label_smoothing` with `ipo`."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.loss = losses.DPOLoss(beta=beta, label_smoothing=label_smoothing, loss_type="ipo" if ipo else "sigmoid")

    def forward(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> PreferenceLoss:  # fmt: skip
        """(loss, chosen_rewards, rejected_rewards) of B pairs, four tensors (B,); raises as `dpo_loss`."""
        return self.loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)


class PairWiseLoss(nn.Module):
    """`fastpref.nn.PairwiseRewardLoss` (arXiv 2009.01325)."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = losses.PairwiseRewardLoss()

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """The mean loss of B pairs, tensors (B,), a scalar; raises as `pairwise_reward_loss`."""
        return self.loss(chosen_reward, reject_reward, margin)


class LogExpLoss(PairWiseLoss):
    """The same function of two rewards (arXiv 2204.05862), without a margin."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """As `PairWiseLoss`. `ValueError` for a margin, which OpenRLHF's takes and leaves out."""
        if margin is not None:
            raise ValueError("LogExpLoss has no margin: use PairWiseLoss, or leave it out")
        return super().forward(chosen_reward, reject_reward)


class PolicyLoss(nn.Module):
    """Compute OpenRLHF's clipped surrogate by `fastpref.nn.PPOPolicyLoss` (arXiv 1707.06347, dual clip 1912.09729).

    GSPO and the corrections of the rollout's log-probs raise `NotImplementedError`: fastpref does not compute them.
    """

    def __init__(
        self, clip_eps_low: float = 0.2, clip_eps_high: float = 0.2, dual_clip: float | None = None,
        token_level_loss: bool = True, policy_loss_type: str = "ppo", is_correction_level: str = "off",
        is_correction_mode: str = "mask", is_correction_gating: str = "ratio",
        is_correction_threshold: Any = (0.5, 5.0),
    ) -> None:  # fmt: skip
        super().__init__()
        if (policy_loss_type, is_correction_level) != ("ppo", "off"):
            raise NotImplementedError(
                "PolicyLoss computes policy_loss_type='ppo' with is_correction_level='off', no GSPO and no correction; "
                f"got {policy_loss_type=}, {is_correction_level=}"
            )
        self.loss = losses.PPOPolicyLoss(
            clip=(clip_eps_low, clip_eps_high), dual_clip=dual_clip,
            reduction="token" if token_level_loss else "sequence",
        )  # fmt: skip

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None, dp_size: int = 1, batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Return (loss, clip_ratio, ppo_kl, None, None), scalars.

        The arguments and errors are those of `fastpref.nn.PPOPolicyLoss`. As in OpenRLHF, the loss takes a log-ratio
        beyond ±20 as ±20, without a gradient; clip_ratio is the share of tokens where the clipped branch is the larger,
        whatever the dual clip does; and ppo_kl is the mean of log π_old − log π.
        """
        mask = losses.bool_mask(action_mask, log_probs)
        check_tokens(mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
        log_ratio = bounded_log_ratio(log_probs, old_log_probs)
        result = self.loss(
            log_ratio, torch.zeros_like(log_ratio), advantages, mask, rollout_log_probs, dp_size, batch_num_tokens,
            global_batch_size,
        )  # fmt: skip
        new, old = counted(mask, log_probs.detach(), old_log_probs.detach())
        return result.loss, result.clip_fraction, masked_mean(old - new, mask, "token", None), None, None


class ValueLoss(nn.Module):
    """`fastpref.nn.PPOValueLoss` (arXiv 1909.08593)."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        clip = 1e30 if clip_eps is None else clip_eps  # so far that no value is clipped
        self.loss = losses.PPOValueLoss(clip=clip, reduction="token" if token_level_loss else "sequence")

    def forward(
        self, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None, dp_size: int = 1,
        batch_num_tokens: float | None = None, global_batch_size: float | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss, a scalar; arguments and errors as `fastpref.nn.PPOValueLoss`'."""
        return self.loss(values, old_values, returns, action_mask, dp_size, batch_num_tokens, global_batch_size)


_seam = Seam(
    "openrlhf", SUPPORTED, {"openrlhf.models.utils": (log_probs_from_logits, compute_entropy)},
    {"openrlhf.models.actor:Actor.forward": ("log_probs_from_logits", "compute_entropy")},
)  # fmt: skip


def patch() -> AbstractContextManager[Any]:
    """Make OpenRLHF's actors, and its DPO's and SFT's models, score through `token_logprobs`, in this process.

    Returns:
        A context manager whose exit undoes this call, which does nothing where OpenRLHF is patched already. Without
        `with`, the patch stays until `unpatch`.

    Raises:
        ImportError: OpenRLHF is not installed.
        NotImplementedError: the installed OpenRLHF scores in another way than those of `SUPPORTED`.
    """
    return _seam.patch()


def unpatch() -> None:
    """Give OpenRLHF its own functions back; `RuntimeError` where something else replaced them after `patch`."""
    _seam.unpatch()

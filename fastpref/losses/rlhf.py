"""RLHF by PPO. Advantages have kernels of their own; everything else is its definition, as it stands in `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.reference.losses.rlhf import (
    AdaptiveKLController,
    PPOLoss,
    PPOPolicyLoss,
    PPOValueLoss,
    check_gae,
    kl_shaped_rewards,
    masked_whiten,
    ppo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ptx_loss,
)
from fastpref_kernels import ops

assert ops  # importing it registers the operators

__all__ = [
    "AdaptiveKLController",
    "PPOLoss",
    "PPOPolicyLoss",
    "PPOValueLoss",
    "gae",
    "kl_shaped_rewards",
    "masked_whiten",
    "ppo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ptx_loss",
]


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} − V_t.

    V and A beyond the last token are 0. Where a mask has holes, t + 1 is the next token that counts. One launch on a
    GPU; on a CPU products with blocks of γλ's powers, and no loop over time.

    Args:
        rewards: (B, T), r, any floating dtype; computed in float32 (float64 for float64).
        values: (B, T), V, in the rewards' units.
        mask: (B, T) bool, True where a token counts.
        gamma: γ in [0, 1], the discount a token.
        lam: λ in [0, 1]: 0 trusts the values, 1 the rewards.

    Returns:
        (advantages, returns), (B, T) each, float32 (float64 for float64). returns = advantages + values, and both are 0
        where a token does not count. Both are detached: PPO takes them as constants. A NaN or infinity that counts
        reaches its own sequence alone.

    Raises:
        TypeError: a wrong dtype, or γ or λ is not a number.
        ValueError: shapes or devices differ, or γ or λ is not in [0, 1].
    """
    gamma, lam = check_gae(rewards, values, mask, gamma, lam)
    return torch.ops.fastpref.gae(rewards.detach(), values.detach(), mask, gamma, lam)

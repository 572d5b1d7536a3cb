"""Preference, reward and RLHF losses. `TABLE` and `RLHF` list every one with its formula and paper."""

from fastpref.losses.preference import dpo_loss, implicit_reward, kto_loss, wpo_weights
from fastpref.losses.reward import (
    best_of_k_loss,
    pairwise_reward_loss,
    plackett_luce_loss,
    ranking_loss,
    ranks_from_scores,
)
from fastpref.losses.rlhf import (
    AdaptiveKLController,
    PPOLoss,
    PPOPolicyLoss,
    PPOPolicyResult,
    PPOResult,
    PPOValueLoss,
    PPOValueResult,
    gae,
    kl_shaped_rewards,
    masked_whiten,
    ppo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ptx_loss,
)
from fastpref.losses.table import RLHF, TABLE, Entry, Loss
from fastpref.reference.losses.loss_types import LOSS_TYPES, LossType

__all__ = [
    "LOSS_TYPES",
    "RLHF",
    "TABLE",
    "AdaptiveKLController",
    "Entry",
    "Loss",
    "LossType",
    "PPOLoss",
    "PPOPolicyLoss",
    "PPOPolicyResult",
    "PPOResult",
    "PPOValueLoss",
    "PPOValueResult",
    "best_of_k_loss",
    "dpo_loss",
    "gae",
    "implicit_reward",
    "kl_shaped_rewards",
    "kto_loss",
    "masked_whiten",
    "pairwise_reward_loss",
    "plackett_luce_loss",
    "ppo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ptx_loss",
    "ranking_loss",
    "ranks_from_scores",
    "wpo_weights",
]

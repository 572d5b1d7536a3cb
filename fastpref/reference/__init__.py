"""The public functions in plain PyTorch: same names, same signatures, differentiable, exact in float64.

Every kernel is checked against these definitions. Read them to learn what a function computes. They import nothing else
from fastpref, and check only what a formula needs.
"""

from fastpref.reference.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs
from fastpref.reference.linear_preference import linear_dpo_loss, linear_preference_loss
from fastpref.reference.logprobs import sequence_logprobs, token_logprobs
from fastpref.reference.losses.preference import dpo_loss, implicit_reward, kto_loss
from fastpref.reference.losses.reward import (
    best_of_k_loss,
    pairwise_reward_loss,
    plackett_luce_loss,
    ranking_loss,
    ranks_from_scores,
)
from fastpref.reference.losses.rlhf import (
    AdaptiveKLController,
    gae,
    kl_shaped_rewards,
    masked_whiten,
    ppo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ptx_loss,
)

__all__ = [
    "AdaptiveKLController",
    "best_of_k_loss",
    "dpo_loss",
    "gae",
    "implicit_reward",
    "kl_shaped_rewards",
    "kto_loss",
    "linear_dpo_loss",
    "linear_preference_loss",
    "linear_sequence_logprobs",
    "linear_token_logprobs",
    "masked_whiten",
    "pairwise_reward_loss",
    "plackett_luce_loss",
    "ppo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ptx_loss",
    "ranking_loss",
    "ranks_from_scores",
    "sequence_logprobs",
    "token_logprobs",
]

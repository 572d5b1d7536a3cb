"""Exact, memory-lean log-probs and preference losses for training language models.

`token_logprobs` and `sequence_logprobs` turn logits into log-probs in one pass; the losses turn those, or rewards, into
a training signal. `fastpref.reference` states every one of them in plain PyTorch.
"""

from fastpref import losses, nn, reference
from fastpref._core.results import KTOResult, PreferenceLoss
from fastpref.integrations.transformers import attach, detach
from fastpref.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs
from fastpref.linear_preference import linear_dpo_loss, linear_preference_loss
from fastpref.logprobs import sequence_logprobs, token_logprobs
from fastpref.losses import (
    AdaptiveKLController,
    best_of_k_loss,
    dpo_loss,
    gae,
    implicit_reward,
    kl_shaped_rewards,
    kto_loss,
    masked_whiten,
    pairwise_reward_loss,
    plackett_luce_loss,
    ppo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ptx_loss,
    ranking_loss,
    ranks_from_scores,
)
from fastpref.memory import release_memory

__version__ = "0.2.0"

__all__ = [
    "AdaptiveKLController",
    "KTOResult",
    "PreferenceLoss",
    "attach",
    "best_of_k_loss",
    "detach",
    "dpo_loss",
    "gae",
    "implicit_reward",
    "kl_shaped_rewards",
    "kto_loss",
    "linear_dpo_loss",
    "linear_preference_loss",
    "linear_sequence_logprobs",
    "linear_token_logprobs",
    "losses",
    "masked_whiten",
    "nn",
    "pairwise_reward_loss",
    "plackett_luce_loss",
    "ppo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ptx_loss",
    "ranking_loss",
    "ranks_from_scores",
    "reference",
    "release_memory",
    "sequence_logprobs",
    "token_logprobs",
]

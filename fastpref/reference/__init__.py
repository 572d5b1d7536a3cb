"""Every public function stated in plain PyTorch: same name, same signature, differentiable, exact in float64.

These are the definitions that every kernel is checked against, and what to read to learn what a function computes.
"""

from fastpref.reference.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs
from fastpref.reference.linear_preference import linear_dpo_loss, linear_preference_loss
from fastpref.reference.logprobs import sequence_logprobs, token_logprobs
from fastpref.reference.losses.preference import dpo_loss, implicit_reward
from fastpref.reference.losses.reward import best_of_k_loss, pairwise_reward_loss, ranking_loss

__all__ = [
    "best_of_k_loss",
    "dpo_loss",
    "implicit_reward",
    "linear_dpo_loss",
    "linear_preference_loss",
    "linear_sequence_logprobs",
    "linear_token_logprobs",
    "pairwise_reward_loss",
    "ranking_loss",
    "sequence_logprobs",
    "token_logprobs",
]

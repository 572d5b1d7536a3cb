"""Exact, memory-lean log-probs and preference losses for training language models.

`token_logprobs` and `sequence_logprobs` turn logits into log-probs in one pass; the losses turn those, or rewards, into
a training signal. `fastpref.reference` states every one of them in plain PyTorch.
"""

from fastpref import losses, reference
from fastpref._results import PreferenceLoss
from fastpref.integrations.transformers import attach, detach
from fastpref.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs
from fastpref.linear_preference import linear_dpo_loss, linear_preference_loss
from fastpref.logprobs import sequence_logprobs, token_logprobs
from fastpref.losses import best_of_k_loss, dpo_loss, implicit_reward, pairwise_reward_loss, ranking_loss

__version__ = "0.1.0"

__all__ = [
    "PreferenceLoss",
    "attach",
    "best_of_k_loss",
    "detach",
    "dpo_loss",
    "implicit_reward",
    "linear_dpo_loss",
    "linear_preference_loss",
    "linear_sequence_logprobs",
    "linear_token_logprobs",
    "losses",
    "pairwise_reward_loss",
    "ranking_loss",
    "reference",
    "sequence_logprobs",
    "token_logprobs",
]

"""Preference and reward losses. `fastpref.losses.TABLE` lists every one with its formula and paper."""

from fastpref.losses.preference import dpo_loss, implicit_reward
from fastpref.losses.reward import best_of_k_loss, pairwise_reward_loss, ranking_loss
from fastpref.losses.table import TABLE, Loss
from fastpref.reference.losses.preference import LOSS_TYPES

__all__ = [
    "LOSS_TYPES",
    "TABLE",
    "Loss",
    "best_of_k_loss",
    "dpo_loss",
    "implicit_reward",
    "pairwise_reward_loss",
    "ranking_loss",
]

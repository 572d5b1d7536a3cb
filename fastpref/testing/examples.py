"""A typical call of every loss and every part of PPO, drawn from a seed.

Each function takes a generator and the number B of elements, and returns float64 arguments and keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref.reference.losses.loss_types import LOSS_TYPES

Arguments = tuple[tuple[Tensor, ...], dict[str, Any]]
Example = Callable[[torch.Generator, int], Arguments]
TOKENS = 11


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float64)


def _lengths(generator: torch.Generator, pairs: int) -> Tensor:
    return torch.randint(1, 60, (pairs,), generator=generator, device=generator.device)


def pair_logps(generator: torch.Generator, pairs: int) -> Arguments:
    """Return log-probs of pairs under a policy and a reference."""
    # Summed log-probs of completions of some tens of tokens, and a reference a few nats away.
    policy = -40 + 8 * _normal(generator, 2, pairs)
    ref = policy + 5 * _normal(generator, 2, pairs)
    lengths = {"chosen_lengths": _lengths(generator, pairs), "rejected_lengths": _lengths(generator, pairs)}
    return (policy[0], policy[1], ref[0], ref[1]), lengths


def policy_logps(generator: torch.Generator, pairs: int) -> Arguments:
    """Return log-probs of pairs under a policy alone."""
    (chosen, rejected, *_), lengths = pair_logps(generator, pairs)
    return (chosen, rejected), lengths


def unpaired_logps(generator: torch.Generator, answers: int) -> Arguments:
    """Return log-probs of answers that are marked as good or bad."""
    policy, ref = -40 + 8 * _normal(generator, 2, answers)
    desirable = torch.rand(answers, generator=generator, device=generator.device) < 0.5
    return (policy, ref, desirable), {"kl": 1 + _normal(generator, answers), "undesirable_weight": 1.3}


def pair_rewards(generator: torch.Generator, pairs: int) -> Arguments:
    """Return the rewards of pairs of answers."""
    rewards = 2 * _normal(generator, 2, pairs)
    return (rewards[0], rewards[1]), {"margin": _normal(generator, pairs).abs(), "center_weight": 0.01}


def best_of_four(generator: torch.Generator, prompts: int) -> Arguments:
    """Return the rewards of four answers to each prompt, and the index of the best."""
    best = torch.randint(4, (prompts,), generator=generator, device=generator.device)
    return (2 * _normal(generator, prompts, 4), best), {}


def orders(generator: torch.Generator, prompts: int) -> Arguments:
    """Return the rewards of seven answers to each prompt, and their ranks without ties."""
    ranks = torch.rand(prompts, 7, generator=generator, device=generator.device).argsort(-1)
    mask = torch.rand(prompts, 7, generator=generator, device=generator.device) < 0.8
    return (2 * _normal(generator, prompts, 7), ranks), {"mask": mask}


def rankings(generator: torch.Generator, prompts: int) -> Arguments:
    """Return the rewards of seven answers to each prompt, and their ranks with ties."""
    ranks = torch.randint(5, (prompts, 7), generator=generator, device=generator.device)
    mask = torch.rand(prompts, 7, generator=generator, device=generator.device) < 0.8
    return (2 * _normal(generator, prompts, 7), ranks), {"mask": mask}


def _mask(generator: torch.Generator, sequences: int) -> Tensor:
    """Return the mask of answers of unequal lengths with some holes, whose first token always counts."""
    lengths = torch.randint(1, TOKENS + 1, (sequences, 1), generator=generator, device=generator.device)
    kept = torch.rand(sequences, TOKENS, generator=generator, device=generator.device) < 0.9
    kept[:, 0] = True
    return kept & (torch.arange(TOKENS, device=generator.device) < lengths)


def _policies(generator: torch.Generator, sequences: int) -> tuple[Tensor, Tensor]:
    # A token's log-probs under two policies, a few tenths of a nat apart: a fraction of the ratios is clipped.
    logps = -3 * torch.rand(sequences, TOKENS, generator=generator, device=generator.device, dtype=torch.float64)
    return logps, logps + 0.3 * _normal(generator, sequences, TOKENS)


def _values(generator: torch.Generator, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    old, returns = _normal(generator, 2, sequences, TOKENS)
    return old + 0.3 * _normal(generator, sequences, TOKENS), old, returns


def shaped_rewards(generator: torch.Generator, sequences: int) -> Arguments:
    """Return the scores of answers, and their tokens' log-probs under a policy and a reference."""
    scores, policies = _normal(generator, sequences), _policies(generator, sequences)
    return (scores, *policies, _mask(generator, sequences)), {"kl_coef": 0.1, "estimator": "k3"}


def token_values(generator: torch.Generator, sequences: int) -> Arguments:
    """Return the rewards and the values of tokens."""
    rewards, values = _normal(generator, 2, sequences, TOKENS)
    return (rewards, values, _mask(generator, sequences)), {"gamma": 0.99}


def token_numbers(generator: torch.Generator, sequences: int) -> Arguments:
    """Return one number per token, with mean 1 and standard deviation 2."""
    return (1 + 2 * _normal(generator, sequences, TOKENS), _mask(generator, sequences)), {}


def policy_step(generator: torch.Generator, sequences: int) -> Arguments:
    """Return a step of the policy's loss, with bounds that differ and a dual clip."""
    advantages = _normal(generator, sequences, TOKENS)
    options = {"clip": (0.2, 0.28), "dual_clip": 1.5}
    return (*_policies(generator, sequences), advantages, _mask(generator, sequences)), options


def value_step(generator: torch.Generator, sequences: int) -> Arguments:
    """Return a step of the value head's loss."""
    return (*_values(generator, sequences), _mask(generator, sequences)), {}


def ppo_step(generator: torch.Generator, sequences: int) -> Arguments:
    """Return a step of the policy's and the value head's loss together."""
    (*policy, mask), options = policy_step(generator, sequences)
    return (*policy, *_values(generator, sequences), mask), options


def pretraining(generator: torch.Generator, sequences: int) -> Arguments:
    """Return log-probs of pretraining tokens."""
    logps, _ = _policies(generator, sequences)
    return (logps, _mask(generator, sequences)), {}


# By the name of the row in `fastpref.losses.TABLE` or `fastpref.losses.RLHF`.
EXAMPLES: dict[str, Example] = {
    **{f"dpo_loss:{name}": pair_logps if kind.reference else policy_logps for name, kind in LOSS_TYPES.items()},
    "kto_loss": unpaired_logps,
    "pairwise_reward_loss": pair_rewards,
    "best_of_k_loss": best_of_four,
    "ranking_loss": rankings,
    "plackett_luce_loss": orders,
    "kl_shaped_rewards": shaped_rewards,
    "gae": token_values,
    "masked_whiten": token_numbers,
    "ppo_policy_loss": policy_step,
    "ppo_value_loss": value_step,
    "ppo_loss": ppo_step,
    "ptx_loss": pretraining,
}

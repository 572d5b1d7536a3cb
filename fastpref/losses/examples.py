"""A typical call of every loss, drawn from a seed: what tests and `fastpref check` judge them by.

Each function is (generator, B) -> float64 arguments and keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[tuple[Tensor, ...], dict[str, Any]]
Example = Callable[[torch.Generator, int], Arguments]
TOKENS = 11


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float64)


def _lengths(generator: torch.Generator, pairs: int) -> Tensor:
    return torch.randint(1, 60, (pairs,), generator=generator, device=generator.device)


def pair_logps(generator: torch.Generator, pairs: int) -> Arguments:
    """A loss of pairs against a reference."""
    # Summed log-probs of completions of some tens of tokens, and a reference a few nats away.
    policy = -40 + 8 * _normal(generator, 2, pairs)
    ref = policy + 5 * _normal(generator, 2, pairs)
    lengths = {"chosen_lengths": _lengths(generator, pairs), "rejected_lengths": _lengths(generator, pairs)}
    return (policy[0], policy[1], ref[0], ref[1]), lengths


def policy_logps(generator: torch.Generator, pairs: int) -> Arguments:
    """A loss of pairs without one."""
    (chosen, rejected, *_), lengths = pair_logps(generator, pairs)
    return (chosen, rejected), lengths


def unpaired_logps(generator: torch.Generator, answers: int) -> Arguments:
    """A loss of answers that are good or bad."""
    policy, ref = -40 + 8 * _normal(generator, 2, answers)
    desirable = torch.rand(answers, generator=generator, device=generator.device) < 0.5
    return (policy, ref, desirable), {"kl": 1 + _normal(generator, answers), "undesirable_weight": 1.3}


def pair_rewards(generator: torch.Generator, pairs: int) -> Arguments:
    """A reward model's, of pairs."""
    rewards = 2 * _normal(generator, 2, pairs)
    return (rewards[0], rewards[1]), {"margin": _normal(generator, pairs).abs(), "center_weight": 0.01}


def best_of_four(generator: torch.Generator, prompts: int) -> Arguments:
    """A reward model's, of the best of four."""
    return (
        2 * _normal(generator, prompts, 4),
        torch.randint(4, (prompts,), generator=generator, device=generator.device),
    ), {}


def orders(generator: torch.Generator, prompts: int) -> Arguments:
    """A reward model's, of orders of seven without ties."""
    ranks = torch.rand(prompts, 7, generator=generator, device=generator.device).argsort(-1)
    mask = torch.rand(prompts, 7, generator=generator, device=generator.device) < 0.8
    return (2 * _normal(generator, prompts, 7), ranks), {"mask": mask}


def rankings(generator: torch.Generator, prompts: int) -> Arguments:
    """A reward model's, of rankings of seven with ties."""
    ranks = torch.randint(5, (prompts, 7), generator=generator, device=generator.device)
    mask = torch.rand(prompts, 7, generator=generator, device=generator.device) < 0.8
    return (2 * _normal(generator, prompts, 7), ranks), {"mask": mask}


def _counted(generator: torch.Generator, sequences: int) -> Tensor:
    """Answers of unequal lengths, each of one token at the least, with a hole here and there."""
    lengths = torch.randint(1, TOKENS + 1, (sequences, 1), generator=generator, device=generator.device)
    ends, kept = (
        torch.arange(TOKENS, device=generator.device) < lengths,
        torch.rand(sequences, TOKENS, generator=generator, device=generator.device) < 0.9,
    )
    kept[:, 0] = True
    return ends & kept


def _policies(generator: torch.Generator, sequences: int) -> tuple[Tensor, Tensor]:
    # A token's log-probs under two policies, a few tenths of a nat apart: a fraction of the ratios is clipped.
    logps = -3 * torch.rand(sequences, TOKENS, generator=generator, device=generator.device, dtype=torch.float64)
    return logps, logps + 0.3 * _normal(generator, sequences, TOKENS)


def _values(generator: torch.Generator, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    old, returns = _normal(generator, 2, sequences, TOKENS)
    return old + 0.3 * _normal(generator, sequences, TOKENS), old, returns


def shaped_rewards(generator: torch.Generator, sequences: int) -> Arguments:
    """Scores and log-probs of answers."""
    scores, policies = _normal(generator, sequences), _policies(generator, sequences)
    return (scores, *policies, _counted(generator, sequences)), {"kl_coef": 0.1, "estimator": "k3"}


def token_values(generator: torch.Generator, sequences: int) -> Arguments:
    """Rewards and values of tokens."""
    rewards, values = _normal(generator, 2, sequences, TOKENS)
    return (rewards, values, _counted(generator, sequences)), {"gamma": 0.99}


def whitened(generator: torch.Generator, sequences: int) -> Arguments:
    """What is whitened."""
    return (1 + 2 * _normal(generator, sequences, TOKENS), _counted(generator, sequences)), {}


def policy_step(generator: torch.Generator, sequences: int) -> Arguments:
    """A step of the policy's loss."""
    advantages = _normal(generator, sequences, TOKENS)
    return (*_policies(generator, sequences), advantages, _counted(generator, sequences)), {}


def value_step(generator: torch.Generator, sequences: int) -> Arguments:
    """A step of the value head's."""
    return (*_values(generator, sequences), _counted(generator, sequences)), {}


def ppo_step(generator: torch.Generator, sequences: int) -> Arguments:
    """A step of both."""
    (*policy, mask), _ = policy_step(generator, sequences)
    return (*policy, *_values(generator, sequences), mask), {}


def pretraining(generator: torch.Generator, sequences: int) -> Arguments:
    """Log-probs of pretraining tokens."""
    logps, _ = _policies(generator, sequences)
    return (logps, _counted(generator, sequences)), {}

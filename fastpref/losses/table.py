"""Every loss, once: what tests, benchmarks and the documentation enumerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpref.losses import preference, reward
from fastpref.reference.losses import preference as reference_preference
from fastpref.reference.losses import reward as reference_reward

Example = Callable[[torch.Generator, int], tuple[tuple[Tensor, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
        name: its function's name, and its `loss_type` where the function has several.
        function: the public function.
        reference: its definition in plain PyTorch.
        operator: the operator `fastpref::operator` that computes it in one launch on a GPU.
        options: the keyword arguments that select this row.
        formula: the loss of one element, as text.
        paper: where it comes from, an arXiv id.
        meaning: one line for a reader who knows none of them.
        example: (generator, B) -> float64 arguments and keyword arguments of one typical call; the floating-point
            tensors among the positional ones are differentiable.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    operator: str
    formula: str
    paper: str
    meaning: str
    example: Example
    options: Mapping[str, Any] = field(default_factory=dict)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _logps_example(generator: torch.Generator, pairs: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    # Summed log-probs of completions of some tens of tokens, and a reference a few nats away.
    policy = -40 + 8 * _normal(generator, 2, pairs)
    ref = policy + 5 * _normal(generator, 2, pairs)
    return (policy[0], policy[1], ref[0], ref[1]), {}


def _pair_example(generator: torch.Generator, pairs: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    rewards = 2 * _normal(generator, 2, pairs)
    return (rewards[0], rewards[1]), {"margin": _normal(generator, pairs).abs(), "center_weight": 0.01}


def _best_example(generator: torch.Generator, prompts: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (2 * _normal(generator, prompts, 4), torch.randint(4, (prompts,), generator=generator)), {}


def _ranking_example(generator: torch.Generator, prompts: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    ranks = torch.randint(5, (prompts, 7), generator=generator)
    mask = torch.rand(prompts, 7, generator=generator) < 0.8
    return (2 * _normal(generator, prompts, 7), ranks), {"mask": mask}


TABLE: tuple[Loss, ...] = (
    Loss(
        name="dpo_loss:sigmoid",
        function=preference.dpo_loss,
        reference=reference_preference.dpo_loss,
        operator="dpo_loss",
        options={"loss_type": "sigmoid"},
        formula="−(1−ε)·log σ(u) − ε·log σ(−u), u = β[(w − rw) − (l − rl)]",
        paper="2305.18290",
        meaning="DPO: the chosen completion gains on the rejected one, relative to a reference; ε doubts the labels",
        example=_logps_example,
    ),
    Loss(
        name="pairwise_reward_loss",
        function=reward.pairwise_reward_loss,
        reference=reference_reward.pairwise_reward_loss,
        operator="pairwise_reward_loss",
        formula="−log σ(chosen − rejected − margin) + c·(chosen + rejected)²",
        paper="2009.01325",
        meaning="reward model from pairs (Bradley–Terry), with a margin and a pull towards 0",
        example=_pair_example,
    ),
    Loss(
        name="best_of_k_loss",
        function=reward.best_of_k_loss,
        reference=reference_reward.best_of_k_loss,
        operator="best_of_k_loss",
        formula="−log softmax(rewards)[best]",
        paper="1909.08593",
        meaning="reward model from the best of K answers",
        example=_best_example,
    ),
    Loss(
        name="ranking_loss",
        function=reward.ranking_loss,
        reference=reference_reward.ranking_loss,
        operator="ranking_loss",
        formula="−1/P·Σ log σ(r_i − r_j) over the P pairs with i ranked better than j",
        paper="2203.02155",
        meaning="reward model from a ranking of K answers, all pairs of a prompt together",
        example=_ranking_example,
    ),
)

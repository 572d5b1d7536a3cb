"""Every loss, once: what tests, benchmarks and the documentation enumerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpref.losses import examples, preference, reward, rlhf
from fastpref.losses.examples import Example
from fastpref.reference.losses import preference as reference_preference
from fastpref.reference.losses import reward as reference_reward
from fastpref.reference.losses import rlhf as reference_rlhf
from fastpref.reference.losses.loss_types import LOSS_TYPES, LossType


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One function.

    Attributes:
        name: its name, and its `loss_type` where a function has several.
        function: the public function.
        reference: its definition in plain PyTorch.
        formula: what it computes of one element, as text.
        paper: where it comes from, an arXiv id.
        meaning: one line for a reader who knows none of them.
        example: (generator, B) -> float64 arguments and keyword arguments of one typical call; the floating-point
            tensors among the positional ones are differentiable, but those that the function takes as constants.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    formula: str
    paper: str
    meaning: str
    example: Example


@dataclass(frozen=True, kw_only=True)
class Loss(Entry):
    """One loss of pairs, answers or prompts.

    Attributes:
        operator: the operator `fastpref::operator` that computes it in one launch on a GPU.
        options: the keyword arguments that select this row.
        derivative: its partial derivatives, as text.
        takes: the options that enter the formula, beside those every such function has.
        mixes: whether an element's loss depends on others of its batch, or on an estimate made of it.
    """

    operator: str
    derivative: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    mixes: bool = False


def _preference_row(kind: LossType) -> Loss:
    options: dict[str, Any] = {"loss_type": kind.name}
    if kind.name == "exo_pair":
        options["label_smoothing"] = 0.1  # the one type that is not defined without
    return Loss(
        name=f"dpo_loss:{kind.name}",
        function=preference.dpo_loss,
        reference=reference_preference.dpo_loss,
        operator="dpo_loss",
        options=options,
        formula=kind.formula,
        derivative=kind.derivative,
        takes=tuple(sorted(kind.takes)),
        mixes=kind.mixes_pairs or kind.likelihood,
        paper=kind.paper,
        meaning=kind.meaning,
        example=examples.pair_logps if kind.reference else examples.policy_logps,
    )


TABLE: tuple[Loss, ...] = (
    *map(_preference_row, LOSS_TYPES.values()),
    Loss(
        name="kto_loss",
        function=preference.kto_loss,
        reference=reference_preference.kto_loss,
        operator="kto_loss",
        formula="λ_d[1 − σ(β(Δ − z))] if desirable, else λ_u[1 − σ(β(z − Δ))]; z = max(0, mean kl)",
        derivative="∂Δ = −βλ_d·σ(v)σ(−v) if desirable, else βλ_u·σ(v)σ(−v); v = β(Δ − z)",
        takes=("kl", "desirable_weight", "undesirable_weight"),
        mixes=True,
        paper="2402.01306",
        meaning="KTO: answers known to be good or bad, without pairs, as gains and losses from a reference point",
        example=examples.unpaired_logps,
    ),
    Loss(
        name="pairwise_reward_loss",
        function=reward.pairwise_reward_loss,
        reference=reference_reward.pairwise_reward_loss,
        operator="pairwise_reward_loss",
        formula="−log σ(chosen − rejected − margin) + c·(chosen + rejected)²",
        derivative="∂chosen = 2c(chosen + rejected) − σ(−u), ∂rejected = 2c(chosen + rejected) + σ(−u)",
        takes=("margin", "center_weight"),
        paper="2009.01325",
        meaning="reward model from pairs (Bradley–Terry), with a margin and a pull towards 0",
        example=examples.pair_rewards,
    ),
    Loss(
        name="best_of_k_loss",
        function=reward.best_of_k_loss,
        reference=reference_reward.best_of_k_loss,
        operator="best_of_k_loss",
        formula="−log softmax(rewards)[best]",
        derivative="∂r_j = softmax(rewards)_j − 1[j = best]",
        paper="1909.08593",
        meaning="reward model from the best of K answers",
        example=examples.best_of_four,
    ),
    Loss(
        name="ranking_loss",
        function=reward.ranking_loss,
        reference=reference_reward.ranking_loss,
        operator="ranking_loss",
        formula="−1/P·Σ log σ(r_i − r_j) over the P pairs with i ranked better than j",
        derivative="∂r_k = 1/P·[Σ_i σ(r_k − r_i) − Σ_j σ(r_j − r_k)], over i better and j worse than k",
        takes=("mask",),
        paper="2203.02155",
        meaning="reward model from a ranking of K answers, all pairs of a prompt together",
        example=examples.rankings,
    ),
    Loss(
        name="plackett_luce_loss",
        function=reward.plackett_luce_loss,
        reference=reference_reward.plackett_luce_loss,
        operator="plackett_luce_loss",
        formula="−Σ_i [r_(i) − log Σ_{j≥i} exp r_(j)] in rank order",
        derivative="∂r_k = Σ_{i not below k} exp(r_k)/Σ_{j≥i} exp r_(j) − 1",
        takes=("mask",),
        paper="2305.18290",
        meaning="reward model from a ranking as a whole: each answer chosen from those left",
        example=examples.orders,
    ),
)


def _rlhf_row(function: Callable[..., Any], example: Example, formula: str, paper: str, meaning: str) -> Entry:
    return Entry(
        name=function.__name__,
        function=function,
        reference=getattr(reference_rlhf, function.__name__),
        formula=formula,
        paper=paper,
        meaning=meaning,
        example=example,
    )


RLHF: tuple[Entry, ...] = (
    _rlhf_row(
        rlhf.kl_shaped_rewards,
        examples.shaped_rewards,
        "r_t = −c·k_t, plus the score at the last token; k_t = d, d²/2 or e^{−d} − 1 + d, d = log π − log π_ref",
        "1909.08593",
        "the reward model's score, less the price of leaving the reference",
    ),
    _rlhf_row(
        rlhf.gae,
        examples.token_values,
        "A_t = δ_t + γλA_{t+1}, δ_t = r_t + γV_{t+1} − V_t",
        "1506.02438",
        "what a token was worth beyond what its value said",
    ),
    _rlhf_row(
        rlhf.masked_whiten,
        examples.whitened,
        "(x − μ)/√(σ² + 1e-8)",
        "1909.08593",
        "advantages of mean 0 and variance 1",
    ),
    _rlhf_row(
        rlhf.ppo_policy_loss,
        examples.policy_step,
        "max(−Aρ, −A·clip(ρ, 1 − low, 1 + high)), with dual_clip=c at most −A·c where A < 0; ρ = π/π_old",
        "1707.06347",
        "the policy's gradient, until a token has moved far enough",
    ),
    _rlhf_row(
        rlhf.ppo_value_loss,
        examples.value_step,
        "½·max((v − R)², (clip(v, v_old ± ε) − R)²)",
        "1909.08593",
        "a value head fitted to the returns, ε a step at the most",
    ),
    _rlhf_row(
        rlhf.ppo_loss,
        examples.ppo_step,
        "policy loss + c·value loss",
        "1909.08593",
        "both, for a trunk that they share",
    ),
    _rlhf_row(
        rlhf.ptx_loss,
        examples.pretraining,
        "−γ·log π(x_t)",
        "2203.02155",
        "pretraining's likelihood, so that PPO forgets less (PPO-ptx)",
    ),
)

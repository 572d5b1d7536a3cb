"""The tables of all losses, which tests, benchmarks and the documentation iterate over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastpref.losses import preference, reward, rlhf
from fastpref.reference.losses import preference as reference_preference
from fastpref.reference.losses import reward as reference_reward
from fastpref.reference.losses import rlhf as reference_rlhf
from fastpref.reference.losses.loss_types import LOSS_TYPES, LossType

if TYPE_CHECKING:
    from fastpref.testing.examples import Example


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of a table: a function, and its description.

    Attributes:
        name: the name of the function, and its `loss_type` where it has several.
        function: the public function.
        reference: its definition in plain PyTorch.
        formula: the formula of one element, as text.
        paper: the arXiv id of its paper.
        meaning: one line for a reader who knows none of the losses.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    formula: str
    paper: str
    meaning: str

    @property
    def example(self) -> Example:
        """Return a function that takes a generator and B, and draws the arguments of a typical call.

        It returns positional and keyword arguments in float64. The floating-point tensors among the positional ones are
        differentiable, except those that the loss takes as constants.
        """
        # This is imported here, because `import fastpref` must not load test data.
        from fastpref.testing.examples import EXAMPLES

        return EXAMPLES[self.name]


@dataclass(frozen=True, kw_only=True)
class Loss(Entry):
    """One loss of pairs, answers or prompts.

    Attributes:
        operator: the operator `fastpref::operator` that computes it in one launch on a GPU.
        options: the keyword arguments that select this row.
        derivative: the partial derivatives, as text.
        takes: the options that enter the formula, besides those that every such function has.
        mixes: whether an element's loss depends on other elements of its batch, or on an estimate from the batch.
    """

    operator: str
    derivative: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    mixes: bool = False


def _preference_row(kind: LossType) -> Loss:
    options: dict[str, Any] = {"loss_type": kind.name}
    if kind.name == "exo_pair":
        options["label_smoothing"] = 0.1  # the only type that is not defined at 0
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
        meaning="KTO: unpaired answers labelled good or bad, as gains and losses relative to a reference point",
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
        meaning="trains a reward model on pairs (Bradley–Terry), with a margin and a penalty that centers rewards at 0",
    ),
    Loss(
        name="best_of_k_loss",
        function=reward.best_of_k_loss,
        reference=reference_reward.best_of_k_loss,
        operator="best_of_k_loss",
        formula="−log softmax(rewards)[best]",
        derivative="∂r_j = softmax(rewards)_j − 1[j = best]",
        paper="1909.08593",
        meaning="trains a reward model to select the best of K answers",
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
        meaning="trains a reward model on all pairs of a ranking of K answers",
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
        meaning="trains a reward model on a whole ranking: each answer in turn is chosen from the remaining ones",
    ),
)


def _rlhf_row(function: Callable[..., Any], formula: str, paper: str, meaning: str) -> Entry:
    return Entry(
        name=function.__name__,
        function=function,
        reference=getattr(reference_rlhf, function.__name__),
        formula=formula,
        paper=paper,
        meaning=meaning,
    )


RLHF: tuple[Entry, ...] = (
    _rlhf_row(
        rlhf.kl_shaped_rewards,
        "r_t = −c·k_t, plus the score at the last token; k_t = d, d²/2 or e^{−d} − 1 + d, d = log π − log π_ref",
        "1909.08593",
        "subtracts a KL penalty against the reference from the reward model's score",
    ),
    _rlhf_row(
        rlhf.gae,
        "A_t = δ_t + γλA_{t+1}, δ_t = r_t + γV_{t+1} − V_t",
        "1506.02438",
        "generalized advantage estimation: how much better a token was than its value estimate",
    ),
    _rlhf_row(
        rlhf.masked_whiten,
        "(x − μ)/√(σ² + 1e-8)",
        "1909.08593",
        "shifts and scales advantages to mean 0 and variance 1",
    ),
    _rlhf_row(
        rlhf.ppo_policy_loss,
        "max(−Aρ, −A·clip(ρ, 1 − low, 1 + high)), with dual_clip=c at most −A·c where A < 0; ρ = π/π_old",
        "1707.06347",
        "PPO's policy loss: no gradient once the advantage has moved a token's ratio out of the clip range",
    ),
    _rlhf_row(
        rlhf.ppo_value_loss,
        "½·max((v − R)², (clip(v, v_old ± ε) − R)²)",
        "1909.08593",
        "fits a value head to the returns, and clips the change of a value at ε",
    ),
    _rlhf_row(
        rlhf.ppo_loss,
        "policy loss + c·value loss",
        "1909.08593",
        "the sum of both losses, for a policy and a value head that share a trunk",
    ),
    _rlhf_row(
        rlhf.ptx_loss,
        "−γ·log π(x_t)",
        "2203.02155",
        "negative log-likelihood of pretraining data, so that PPO forgets less (PPO-ptx)",
    ),
)

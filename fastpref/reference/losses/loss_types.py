"""The loss types of `dpo_loss`: formula, derivative, options and paper of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


# The class is not frozen, because that would make every call 3 µs slower.
@dataclass
class Pairs:
    """B pairs in the letters of the formulas: (B,) tensors in float32 or float64, and scalars.

    Attributes:
        w: log π(chosen|x), summed over its tokens; their mean where lengths are normalised.
        l: log π(rejected|x), summed or averaged as w is.
        rw: log π_ref(chosen|x), summed or averaged as w is; 0 without a reference.
        rl: log π_ref(rejected|x), likewise.
        dw: Δw = w − rw under the f-divergence, then divided where lengths are normalised.
        dl: Δl = l − rl, likewise.
        h: Δw − Δl.
        nll: −log π(chosen|x), scaled so that its mean over the pairs is the one that `sft_reduction` names; None where
            no loss type needs it.
        margin: m, the least gap that a pair should have, or None.
        beta: β.
        epsilon: ε, the label smoothing.
        delta: δ of `bco_pair`.
        gamma: γ of `simpo`.
        tau: τ of `discopop`.
    """

    w: Tensor
    l: Tensor  # noqa: E741 - the papers' letter
    rw: Tensor
    rl: Tensor
    dw: Tensor
    dl: Tensor
    h: Tensor
    nll: Tensor | None
    margin: Tensor | float | None
    beta: float
    epsilon: float
    delta: float
    gamma: float
    tau: float

    @property
    def u(self) -> Tensor:
        """Return β·h − margin."""
        return self.beyond(self.h)

    def beyond(self, gap: Tensor) -> Tensor:
        """Return β·gap − margin."""
        return self.beta * gap if self.margin is None else self.beta * gap - self.margin


@dataclass(frozen=True, eq=False)  # one instance per name, which is a key of caches
class LossType:
    """One `loss_type`.

    Attributes:
        name: its name in `loss_type`.
        losses: pairs -> losses (B,).
        formula: the loss of one pair, as text; ℓ = log σ, u = βh − margin, h = Δw − Δl.
        derivative: its partial derivatives, as text.
        paper: the arXiv id of its paper.
        meaning: one line for a reader who knows none of the loss types.
        takes: the options beside β that enter the formula. `dpo_loss` refuses any other.
        reference: whether the formula compares with the reference's log-probs.
        normalized: whether the formula always divides log-probs by the completions' lengths.
        likelihood: whether the loss is only the likelihood of the chosen completion.
        mixes_pairs: whether a pair's loss depends on other pairs.
    """

    name: str
    losses: Callable[[Pairs], Tensor]
    formula: str
    derivative: str
    paper: str
    meaning: str
    takes: frozenset[str] = frozenset()
    reference: bool = True
    normalized: bool = False
    likelihood: bool = False
    mixes_pairs: bool = False


def under_divergence(
    dw: Tensor, dl: Tensor, n_w: Tensor | None, n_l: Tensor | None, kind: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Δw, Δl and their difference under an f-divergence, then divided by the lengths if they are given.

    f′(π/π_ref) replaces a log-ratio (arXiv 2309.16240): Δ of `reverse_kl`, 1 − e^{−Δ} of `forward_kl`,
    log 2 + ℓ(Δ) of `js`, and (e^{(α−1)Δ} − 1)/(α−1) of `alpha`, which is Δ at α = 1.
    """
    if kind not in F_DIVERGENCES:
        raise ValueError(f"f_divergence must be one of {', '.join(map(repr, F_DIVERGENCES))}; got {kind!r}")
    rate = (0.0 if kind == "forward_kl" else alpha) - 1
    if kind == "js":
        dw, dl = (math.log(2) + F.logsigmoid(ratio) for ratio in (dw, dl))
    if kind in ("reverse_kl", "js") or rate == 0:
        if n_w is not None and n_l is not None:
            dw, dl = dw / n_w, dl / n_l
        return dw, dl, dw - dl
    # Clamp at the dtype's largest number: at an infinite log-ratio a loss may be 0, and its gradient 0 times infinity.
    largest = math.log(torch.finfo(dw.dtype).max) + min(math.log(abs(rate)), 0.0) - 1e-3
    a, b = rate * dw, rate * dl
    x, y = (torch.expm1(t.clamp(max=largest)) / rate for t in (a, b))
    # Where both are clamped, their exponents tell which one is larger.
    ahead = a - b
    if n_w is not None and n_l is not None:
        x, y, ahead = x / n_w, y / n_l, ahead - torch.log(n_w / n_l)
    held = (a > largest) & (b > largest)
    gap = torch.sign(ahead) * -torch.expm1(-ahead.abs()) * math.exp(largest)
    return x, y, torch.where(held, gap.detach() / rate, x - y)


def smoothed(u: Tensor, epsilon: float) -> Tensor:
    """Return −(1−ε)ℓ(u) − εℓ(−u)."""
    losses = -F.logsigmoid(u)
    # The second term is left out at ε = 0, where ℓ(−u) may be −inf.
    return (1 - epsilon) * losses - epsilon * F.logsigmoid(-u) if epsilon else losses


def log_odds(x: Tensor) -> Tensor:
    """Return log(p/(1−p)) for x = log p ≤ 0. p = 1 is replaced by the largest p whose complement the dtype can hold."""
    # Only the value is replaced: the gradient at p = 1 is the limit.
    nearest = -torch.finfo(x.dtype).tiny
    x = torch.where(x > nearest, x + (nearest - x).detach(), x)
    near = x > -math.log(2)
    complement = torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )
    return x - complement


def _sorted(values: Tensor) -> Tensor:
    return values.sort(stable=True).values


def _robust(p: Pairs) -> Tensor:
    # The flipped label's part is left out at ε = 0, where ℓ(−u) may be −inf.
    flipped = p.epsilon * F.logsigmoid(-p.u) if p.epsilon else 0.0
    return (flipped - (1 - p.epsilon) * F.logsigmoid(p.u)) / (1 - 2 * p.epsilon)


def _exo(p: Pairs) -> Tensor:
    won = torch.sigmoid(p.u) * (F.logsigmoid(p.u) - math.log1p(-p.epsilon))
    return won + torch.sigmoid(-p.u) * (F.logsigmoid(-p.u) - math.log(p.epsilon))


def _nca(p: Pairs) -> Tensor:
    x, y = p.beta * p.dw, p.beta * p.dl
    return -F.logsigmoid(x) - F.logsigmoid(-x) / 2 - F.logsigmoid(-y) / 2


def _discopop(p: Pairs) -> Tensor:
    # m·exp(−u) is computed as one exponential: of two separate factors, one may be 0 where the other is infinite.
    return -torch.sigmoid(-p.u / p.tau) * F.logsigmoid(p.u) + torch.exp(F.logsigmoid(p.u / p.tau) - p.u)


def _likelihood(p: Pairs) -> Tensor:
    assert p.nll is not None
    return p.nll


_OF_U = frozenset({"margin", "f_divergence", "weights", "length_normalize"})
_OF_RATIOS = _OF_U - {"margin"}
_SMOOTHED = frozenset({"label_smoothing"})
_BY_U_SMOOTHED = "∂u = εσ(u) − (1−ε)σ(−u)"

LOSS_TYPES: dict[str, LossType] = {
    row.name: row
    for row in (
        LossType(
            "sigmoid",
            lambda p: smoothed(p.u, p.epsilon),
            formula="−(1−ε)ℓ(u) − εℓ(−u)",
            derivative=_BY_U_SMOOTHED,
            paper="2305.18290",
            meaning="DPO: the chosen log-ratio should exceed the rejected one; ε smooths the labels",
            takes=_OF_U | _SMOOTHED,
        ),
        LossType(
            "robust",
            _robust,
            formula="[−(1−ε)ℓ(u) + εℓ(−u)]/(1−2ε)",
            derivative="∂u = −[(1−ε)σ(−u) + εσ(u)]/(1−2ε)",
            paper="2403.00409",
            meaning="Robust DPO: an unbiased estimate of DPO if a share ε < ½ of the labels is flipped",
            takes=_OF_U | _SMOOTHED,
        ),
        LossType(
            "hinge",
            lambda p: torch.relu(1 - p.u),
            formula="max(0, 1 − u)",
            derivative="∂u = −1 where u < 1, else 0",
            paper="2305.10425",
            meaning="SLiC: a hinge loss on DPO's reward margin; pairs with u ≥ 1 have no gradient",
            takes=_OF_U,
        ),
        LossType(
            "ipo",
            lambda p: (p.h - 1 / (2 * p.beta)) ** 2,
            formula="(h − 1/(2β))²",
            derivative="∂h = 2(h − 1/(2β))",
            paper="2310.12036",
            meaning="IPO: a squared loss that moves h to 1/(2β); per token with length_normalize",
            takes=_OF_RATIOS,
        ),
        LossType(
            "sigmoid_norm",
            lambda p: -F.logsigmoid(p.u),
            formula="−ℓ(u), with every log-prob divided by its completion's length",
            derivative="∂u = −σ(−u)",
            paper="2411.15124",
            meaning="DPO of mean log-probs, so that length alone is not rewarded",
            takes=_OF_U,
            normalized=True,
        ),
        LossType(
            "exo_pair",
            _exo,
            formula="σ(u)[ℓ(u) − log(1−ε)] + σ(−u)[ℓ(−u) − log ε], 0 < ε < 1",
            derivative="∂u = σ(u)σ(−u)[u − log(1−ε) + log ε]",
            paper="2402.00856",
            meaning="EXO: the reverse KL divergence between the policy's preference and a smoothed label",
            takes=_OF_U | _SMOOTHED,
        ),
        LossType(
            "nca_pair",
            _nca,
            formula="−ℓ(βΔw) − ½ℓ(−βΔw) − ½ℓ(−βΔl)",
            derivative="∂Δw = β[½σ(βΔw) − σ(−βΔw)], ∂Δl = ½βσ(βΔl)",
            paper="2402.05369",
            meaning="NCA: compares each completion with the reference, to keep the chosen one's likelihood up",
            takes=_OF_RATIOS,
        ),
        LossType(
            "bco_pair",
            lambda p: -F.logsigmoid(p.beta * p.dw - p.delta) - F.logsigmoid(p.delta - p.beta * p.dl),
            formula="−ℓ(βΔw − δ) − ℓ(−(βΔl − δ))",
            derivative="∂Δw = −βσ(δ − βΔw), ∂Δl = βσ(βΔl − δ)",
            paper="2404.04656",
            meaning="BCO: classifies completions as chosen or rejected, with the reward minus δ as the logit",
            takes=_OF_RATIOS | {"delta"},
        ),
        LossType(
            "sppo_hard",
            lambda p: (p.dw - 1 / (2 * p.beta)) ** 2 + (p.dl + 1 / (2 * p.beta)) ** 2,
            formula="(Δw − 1/(2β))² + (Δl + 1/(2β))²",
            derivative="∂Δw = 2(Δw − 1/(2β)), ∂Δl = 2(Δl + 1/(2β))",
            paper="2405.00675",
            meaning="SPPO with hard labels: squared losses that move Δw to 1/(2β) and Δl to −1/(2β)",
            takes=_OF_RATIOS,
        ),
        LossType(
            "apo_zero",
            lambda p: torch.sigmoid(-p.beta * p.dw) + torch.sigmoid(p.beta * p.dl),
            formula="1 − σ(βΔw) + σ(βΔl)",
            derivative="∂Δw = −βσ(βΔw)σ(−βΔw), ∂Δl = βσ(βΔl)σ(−βΔl)",
            paper="2408.06266",
            meaning="APO-zero: raises Δw and lowers Δl; for answers better than the model's own",
            takes=_OF_RATIOS,
        ),
        LossType(
            "apo_down",
            lambda p: torch.sigmoid(p.beta * p.dw) + torch.sigmoid(-p.u),
            formula="σ(βΔw) + 1 − σ(u)",
            derivative="∂Δw = βσ(βΔw)σ(−βΔw) − βσ(u)σ(−u), ∂Δl = βσ(u)σ(−u)",
            paper="2408.06266",
            meaning="APO-down: lowers Δw and Δl, and Δl more; for answers worse than the model's own",
            takes=_OF_U,
        ),
        LossType(
            "discopop",
            _discopop,
            formula="−(1−m)ℓ(u) + m·exp(−u), m = σ(u/τ)",
            derivative="∂u = m(1−m)ℓ(u)/τ − (1−m)σ(−u) + m·exp(−u)·[(1−m)/τ − 1]",
            paper="2406.08414",
            meaning="DiscoPOP: a blend of logistic and exponential loss, discovered by a language model",
            takes=_OF_U | {"discopop_tau"},
        ),
        LossType(
            "aot",
            lambda p: smoothed(p.beta * (_sorted(p.w - p.l) - _sorted(p.rw - p.rl)), p.epsilon),
            formula="−(1−ε)ℓ(u) − εℓ(−u), u = β[sort(w−l) − sort(rw−rl)] over the batch",
            derivative=_BY_U_SMOOTHED,
            paper="2406.05882",
            meaning="AOT: compares the sorted margins of the policy and the reference (stochastic dominance)",
            takes=frozenset({"length_normalize"}) | _SMOOTHED,
            mixes_pairs=True,
        ),
        LossType(
            "aot_unpaired",
            lambda p: smoothed(p.beta * (_sorted(p.dw) - _sorted(p.dl)), p.epsilon),
            formula="−(1−ε)ℓ(u) − εℓ(−u), u = β[sort Δw − sort Δl] over the batch",
            derivative=_BY_U_SMOOTHED,
            paper="2406.05882",
            meaning="AOT without pairs: compares the sorted chosen and rejected log-ratios",
            takes=frozenset({"length_normalize", "f_divergence"}) | _SMOOTHED,
            mixes_pairs=True,
        ),
        LossType(
            "simpo",
            lambda p: smoothed(p.beyond(p.w - p.l) - p.gamma, p.epsilon),
            formula="−(1−ε)ℓ(u) − εℓ(−u), u = β(w/n_w − l/n_l) − γ",
            derivative=_BY_U_SMOOTHED,
            paper="2405.14734",
            meaning="SimPO: compares mean log-probs, with a margin γ and without a reference",
            takes=frozenset({"margin", "weights", "length_normalize", "gamma"}) | _SMOOTHED,
            reference=False,
            normalized=True,
        ),
        LossType(
            "cpo",
            lambda p: smoothed(p.beyond(p.w - p.l), p.epsilon),
            formula="−(1−ε)ℓ(u) − εℓ(−u), u = β(w − l)",
            derivative=_BY_U_SMOOTHED,
            paper="2401.08417",
            meaning="CPO: DPO with a uniform reference; sft_weight adds its likelihood term",
            takes=frozenset({"margin", "weights", "length_normalize"}) | _SMOOTHED,
            reference=False,
        ),
        LossType(
            "orpo",
            lambda p: -p.beta * F.logsigmoid(log_odds(p.w) - log_odds(p.l)),
            formula="−βℓ(o(w/n_w) − o(l/n_l)), o(x) = x − log(1 − eˣ)",
            derivative="∂(w/n_w) = −βσ(o_l − o_w)/(1 − e^{w/n_w}), ∂(l/n_l) = βσ(o_l − o_w)/(1 − e^{l/n_l})",
            paper="2403.07691",
            meaning="ORPO: compares the odds of the mean token probability; sft_weight adds its likelihood term",
            takes=frozenset({"weights", "length_normalize"}),
            reference=False,
            normalized=True,
        ),
        LossType(
            "sft",
            _likelihood,
            formula="−Σ w/Σ n_w over the batch, or −mean(w/n_w), depending on sft_reduction",
            derivative="∂w = −1/Σ n_w, or −1/(B·n_w)",
            paper="2404.19733",
            meaning="the chosen completions' negative log-likelihood, to add to another type (RPO)",
            reference=False,
            likelihood=True,
        ),
    )
}

"""The losses of `dpo_loss` and `kto_loss` in 50 digits, written from their papers a pair at a time.

`LOSS_TYPES` has a definition for every `loss_type`. `test_coverage.py` fails for a type without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.oracles.precision import Number, Numbers, derivative, minus_log_sigmoid, mp, sigmoid


@dataclass(frozen=True)
class Pair:
    """One pair, and the scalars that enter its loss.

    Attributes:
        w: the policy's log-prob of the chosen completion, divided by its length where lengths are normalized.
        l: the same of the rejected completion.
        rw: the reference's log-prob of the chosen completion, likewise.
        rl: the same of the rejected completion.
        dw: f(Δw) of the f-divergence, divided by the length after it where lengths are normalized.
        dl: the same of the rejected completion.
        likelihood: the share of the pair in the chosen completions' negative log-likelihood.
        margin: what the pair should at least be apart by.
        beta: β.
        epsilon: the label smoothing ε.
        delta: δ of `bco_pair`.
        gamma: γ of `simpo`.
        tau: τ of `discopop`.
    """

    w: Number
    l: Number  # noqa: E741
    rw: Number
    rl: Number
    dw: Number
    dl: Number
    likelihood: Number
    margin: Number
    beta: Number
    epsilon: Number
    delta: Number
    gamma: Number
    tau: Number

    @property
    def h(self) -> Number:
        """Δw − Δl."""
        return self.dw - self.dl

    @property
    def u(self) -> Number:
        """β·h − margin."""
        return self.beta * self.h - self.margin


@dataclass(frozen=True)
class LossType:
    """The definition of one `loss_type`.

    Attributes:
        losses: the losses of a batch of pairs.
        takes: the options, beside β, that enter it.
        needs: the options that it is not defined without.
        reference: whether it depends on the reference.
        normalized: whether it always divides by the lengths.
        mixes: whether the loss of a pair depends on the other pairs.
    """

    losses: Callable[[Sequence[Pair]], Numbers]
    takes: frozenset[str] = frozenset()
    needs: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = True
    normalized: bool = False
    mixes: bool = False


def each(loss: Callable[[Pair], Number]) -> Callable[[Sequence[Pair]], Numbers]:
    """Return a loss of a batch whose pairs do not depend on each other."""
    return lambda pairs: [loss(pair) for pair in pairs]


def smoothed(u: Number, epsilon: Number) -> Number:
    """Return −(1−ε)·log σ(u) − ε·log σ(−u)."""
    return (1 - epsilon) * minus_log_sigmoid(u) + epsilon * minus_log_sigmoid(-u)


def log_odds(x: Number) -> Number:
    """Return log(p/(1−p)) for x = log p."""
    return x - mp.log(-mp.expm1(x))


def divergence(name: str, alpha: float, ratio: Number) -> Number:
    """Return what takes the place of a log-ratio under an f-divergence."""
    if name == "forward_kl":
        return 1 - mp.exp(-ratio)
    if name == "js":
        return mp.log(2) - minus_log_sigmoid(ratio)
    if name == "alpha" and alpha != 1:
        power = mp.mpf(alpha) - 1
        return mp.expm1(power * ratio) / power
    return ratio


def robust(p: Pair) -> Number:
    """cDPO's loss, made unbiased for labels flipped with probability ε."""
    return ((1 - p.epsilon) * minus_log_sigmoid(p.u) - p.epsilon * minus_log_sigmoid(-p.u)) / (1 - 2 * p.epsilon)


def exo_pair(p: Pair) -> Number:
    """The KL divergence from the policy's preference to the smoothed label."""
    wins = sigmoid(p.u) * (-minus_log_sigmoid(p.u) - mp.log1p(-p.epsilon))
    return wins + sigmoid(-p.u) * (-minus_log_sigmoid(-p.u) - mp.log(p.epsilon))


def nca_pair(p: Pair) -> Number:
    """Each completion against the reference."""
    both = (minus_log_sigmoid(-p.beta * p.dw) + minus_log_sigmoid(-p.beta * p.dl)) / 2
    return minus_log_sigmoid(p.beta * p.dw) + both


def bco_pair(p: Pair) -> Number:
    """A classifier of chosen from rejected, with threshold δ."""
    return minus_log_sigmoid(p.beta * p.dw - p.delta) + minus_log_sigmoid(p.delta - p.beta * p.dl)


def sppo_hard(p: Pair) -> Number:
    """Log-ratios drawn to ±1/(2β)."""
    return (p.dw - 1 / (2 * p.beta)) ** 2 + (p.dl + 1 / (2 * p.beta)) ** 2


def discopop(p: Pair) -> Number:
    """A blend of the logistic and the exponential loss."""
    return sigmoid(-p.u / p.tau) * minus_log_sigmoid(p.u) + sigmoid(p.u / p.tau) * mp.exp(-p.u)


def aot(pairs: Sequence[Pair]) -> Numbers:
    """Margins of the policy against margins of the reference, each sorted over the batch."""
    policy, reference = sorted(p.w - p.l for p in pairs), sorted(p.rw - p.rl for p in pairs)
    return [smoothed(p.beta * (a - b), p.epsilon) for p, a, b in zip(pairs, policy, reference, strict=True)]


def aot_unpaired(pairs: Sequence[Pair]) -> Numbers:
    """Log-ratios of the chosen against those of the rejected, each sorted over the batch."""
    chosen, rejected = sorted(p.dw for p in pairs), sorted(p.dl for p in pairs)
    return [smoothed(p.beta * (a - b), p.epsilon) for p, a, b in zip(pairs, chosen, rejected, strict=True)]


RATIOS = frozenset({"f_divergence", "weights", "length_normalize"})
GAP = RATIOS | {"margin"}
SMOOTHED = frozenset({"label_smoothing"})
LOSS_TYPES: dict[str, LossType] = {
    "sigmoid": LossType(each(lambda p: smoothed(p.u, p.epsilon)), GAP | SMOOTHED),
    "robust": LossType(each(robust), GAP | SMOOTHED),
    "hinge": LossType(each(lambda p: max(mp.mpf(0), 1 - p.u)), GAP),
    "ipo": LossType(each(lambda p: (p.h - 1 / (2 * p.beta)) ** 2), RATIOS),
    "sigmoid_norm": LossType(each(lambda p: minus_log_sigmoid(p.u)), GAP, normalized=True),
    "exo_pair": LossType(each(exo_pair), GAP | SMOOTHED, needs={"label_smoothing": 0.1}),
    "nca_pair": LossType(each(nca_pair), RATIOS),
    "bco_pair": LossType(each(bco_pair), RATIOS | {"delta"}),
    "sppo_hard": LossType(each(sppo_hard), RATIOS),
    "apo_zero": LossType(each(lambda p: sigmoid(-p.beta * p.dw) + sigmoid(p.beta * p.dl)), RATIOS),
    "apo_down": LossType(each(lambda p: sigmoid(p.beta * p.dw) + sigmoid(-p.u)), GAP),
    "discopop": LossType(each(discopop), GAP | {"discopop_tau"}),
    "aot": LossType(aot, SMOOTHED | {"length_normalize"}, mixes=True),
    "aot_unpaired": LossType(aot_unpaired, SMOOTHED | {"length_normalize", "f_divergence"}, mixes=True),
    "simpo": LossType(
        each(lambda p: smoothed(p.beta * (p.w - p.l) - p.gamma - p.margin, p.epsilon)),
        SMOOTHED | {"margin", "weights", "length_normalize", "gamma"},
        reference=False,
        normalized=True,
    ),
    "cpo": LossType(
        each(lambda p: smoothed(p.beta * (p.w - p.l) - p.margin, p.epsilon)),
        SMOOTHED | {"margin", "weights", "length_normalize"},
        reference=False,
    ),
    "orpo": LossType(
        each(lambda p: p.beta * minus_log_sigmoid(log_odds(p.w) - log_odds(p.l))),
        frozenset({"weights", "length_normalize"}),
        reference=False,
        normalized=True,
    ),
    "sft": LossType(each(lambda p: p.likelihood), reference=False, mixes=True),
}


def dpo_losses(
    kind: str,
    columns: Sequence[Numbers],
    lengths: Sequence[Sequence[int]],
    *,
    beta: Any = 0.1,
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    margin: Numbers | None = None,
    weights: Numbers | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    reference_free: bool = False,
    delta: float = 0.0,
    gamma: float = 0.5,
    discopop_tau: float = 0.05,
    sft_weight: float = 0.0,
    sft_reduction: str = "token",
) -> Numbers:
    """Return the loss of every pair, with `dpo_loss`'s options.

    Args:
        kind: the `loss_type`.
        columns: w, l, rw and rl of every pair.
        lengths: n_w and n_l of every pair.
    """
    definition, size = LOSS_TYPES[kind], len(columns[0])
    nw, nl = ([max(1, n) for n in side] for side in lengths)
    by_length = length_normalize or definition.normalized
    zeros = reference_free or not definition.reference
    tokens = max(1, sum(lengths[0]))
    pairs = []
    for i in range(size):
        w, l, rw, rl = (column[i] for column in columns)  # noqa: E741
        if zeros:
            rw = rl = mp.mpf(0)
        divisors = (nw[i], nl[i]) if by_length else (1, 1)
        ratios = (divergence(f_divergence, f_alpha, ratio) for ratio in (w - rw, l - rl))
        dw, dl = (ratio / n for ratio, n in zip(ratios, divisors, strict=True))
        pairs.append(
            Pair(
                *(x / n for x, n in zip((w, l, rw, rl), 2 * divisors, strict=True)),
                dw,
                dl,
                likelihood=-w / nw[i] if sft_reduction == "sequence" else -w * size / tokens,
                margin=margin[i] if margin else mp.mpf(0),
                beta=mp.mpf(beta),
                epsilon=mp.mpf(label_smoothing),
                delta=mp.mpf(delta),
                gamma=mp.mpf(gamma),
                tau=mp.mpf(discopop_tau),
            )
        )
    losses = definition.losses(pairs)
    if weights:
        losses = [a * b for a, b in zip(losses, weights, strict=True)]
    return [loss + sft_weight * pair.likelihood for loss, pair in zip(losses, pairs, strict=True)]


def dpo_losses_and_gradients(
    kind: str, columns: list[Numbers], lengths: list[list[int]], upstream: Numbers, options: dict[str, Any]
) -> tuple[Numbers, list[Numbers]]:
    """Return the losses, and the gradients of their sum weighted by `upstream`, one for every one of `columns`."""
    size = len(upstream)
    losses = dpo_losses(kind, columns, lengths, **options)
    mixes = LOSS_TYPES[kind].mixes or options.get("sft_weight")
    gradients = [[mp.mpf(0)] * size for _ in columns]
    for rows in [range(size)] if mixes else [[i] for i in range(size)]:
        part = {name: [v[i] for i in rows] if isinstance(v, list) else v for name, v in options.items()}
        n = [[side[i] for i in rows] for side in lengths]

        def total(flat: Numbers, rows: Sequence[int] = rows, part: dict[str, Any] = part, n: Any = n) -> Number:
            split = [flat[c * len(rows) : (c + 1) * len(rows)] for c in range(4)]
            each = dpo_losses(kind, split, n, **part)
            return sum(upstream[i] * x for i, x in zip(rows, each, strict=True))

        found = derivative(total, [column[i] for column in columns for i in rows])
        for position, value in enumerate(found):
            gradients[position // len(rows)][rows[position % len(rows)]] = value
    return losses, gradients


def kto_losses(
    policy: Numbers,
    ref: Numbers,
    desirable: Sequence[bool],
    *,
    kl: Number,
    beta: Any = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Numbers:
    """Return the loss of every answer; `kl` is the mean of the estimates, before it is cut at 0."""
    baseline = max(mp.mpf(0), kl)
    losses = []
    for p, r, good in zip(policy, ref, desirable, strict=True):
        v = mp.mpf(beta) * (p - r - baseline)
        losses.append(desirable_weight * sigmoid(-v) if good else undesirable_weight * sigmoid(v))
    return losses

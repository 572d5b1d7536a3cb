"""Every type of `dpo_loss`, and `kto_loss`, against the definitions written out here in 50 digits, a pair at a time.

What a result may miss the truth by is eight times what one rounding of every input does to it, and eight ulp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpmath import MPContext
from torch import Tensor

from fastpref import dpo_loss, kto_loss

mp = MPContext()
mp.dps = 50

# What each option applies to.
FREE = ("simpo", "cpo", "orpo", "sft")
NORMALISED = ("sigmoid_norm", "simpo", "orpo")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")
MARGIN = ("sigmoid", "robust", "hinge", "sigmoid_norm", "exo_pair", "apo_down", "discopop", "simpo", "cpo")
DIVERGENCE = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop")
SORTED = ("aot", "aot_unpaired")
TYPES = (
    "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop", "aot", "aot_unpaired", "simpo", "cpo", "orpo", "sft",
)  # fmt: skip
DIVISIBLE = tuple(kind for kind in TYPES if kind != "sft")  # by the lengths

Numbers = list[Any]
every_type = pytest.mark.parametrize("kind", TYPES)


def required(kind: str) -> dict[str, Any]:
    """The options without which the type is refused."""
    return {"label_smoothing": 0.1} if kind == "exo_pair" else {}


def minus_log_sigmoid(x: Any) -> Any:
    return mp.log1p(mp.exp(-x))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def divergence(name: str, alpha: float, ratio: Any) -> Any:
    """f of one log-ratio."""
    if name == "forward_kl":
        return 1 - mp.exp(-ratio)
    if name == "js":
        return mp.log(2) - minus_log_sigmoid(ratio)
    if name == "alpha" and alpha != 1:
        power = mp.mpf(alpha) - 1
        return mp.expm1(power * ratio) / power
    return ratio


def log_odds(x: Any) -> Any:
    return x - mp.log(-mp.expm1(x))


def definition(
    kind: str, columns: Sequence[Numbers], lengths: Sequence[Sequence[int]], *, beta: Any = 0.1,
    label_smoothing: float = 0.0, length_normalize: bool = False, margin: Numbers | None = None,
    weights: Numbers | None = None, f_divergence: str = "reverse_kl", f_alpha: float = 0.5,
    reference_free: bool = False, delta: float = 0.0, gamma: float = 0.5, discopop_tau: float = 0.05,
    sft_weight: float = 0.0, sft_reduction: str = "token",
) -> Numbers:  # fmt: skip
    """The loss of every pair. `columns` are w, l, rw, rl and `lengths` n_w, n_l."""
    w, l, rw, rl = columns  # noqa: E741
    pairs = range(len(w))
    nw, nl = ([max(1, n) for n in side] for side in lengths)
    beta, eps, tau = mp.mpf(beta), mp.mpf(label_smoothing), mp.mpf(discopop_tau)
    margins = margin or [mp.mpf(0)] * len(w)
    if reference_free:
        rw = rl = [mp.mpf(0)] * len(w)
    by_length = length_normalize or kind in NORMALISED

    def smoothed(u: Any) -> Any:
        return (1 - eps) * minus_log_sigmoid(u) + eps * minus_log_sigmoid(-u)

    def likelihood() -> Numbers:
        if sft_reduction == "sequence":
            return [-w[i] / nw[i] for i in pairs]
        return [-w[i] * len(w) / max(1, sum(lengths[0])) for i in pairs]

    def one(i: int) -> Any:
        if kind in FREE:
            a, b = (w[i] / nw[i], l[i] / nl[i]) if by_length else (w[i], l[i])
            if kind == "orpo":
                return beta * minus_log_sigmoid(log_odds(a) - log_odds(b))
            return smoothed(beta * (a - b) - (mp.mpf(gamma) if kind == "simpo" else 0) - margins[i])
        dw, dl = (divergence(f_divergence, f_alpha, d) for d in (w[i] - rw[i], l[i] - rl[i]))
        if by_length:
            dw, dl = dw / nw[i], dl / nl[i]
        h = dw - dl
        u = beta * h - margins[i]
        if kind in ("sigmoid", "sigmoid_norm"):
            return smoothed(u)
        if kind == "robust":
            return ((1 - eps) * minus_log_sigmoid(u) - eps * minus_log_sigmoid(-u)) / (1 - 2 * eps)
        if kind == "hinge":
            return max(mp.mpf(0), 1 - u)
        if kind == "ipo":
            return (h - 1 / (2 * beta)) ** 2
        if kind == "exo_pair":
            wins = sigmoid(u) * (-minus_log_sigmoid(u) - mp.log1p(-eps))
            return wins + sigmoid(-u) * (-minus_log_sigmoid(-u) - mp.log(eps))
        if kind == "nca_pair":
            both = (minus_log_sigmoid(-beta * dw) + minus_log_sigmoid(-beta * dl)) / 2
            return minus_log_sigmoid(beta * dw) + both
        if kind == "bco_pair":
            return minus_log_sigmoid(beta * dw - delta) + minus_log_sigmoid(delta - beta * dl)
        if kind == "sppo_hard":
            return (dw - 1 / (2 * beta)) ** 2 + (dl + 1 / (2 * beta)) ** 2
        if kind == "apo_zero":
            return sigmoid(-beta * dw) + sigmoid(beta * dl)
        if kind == "apo_down":
            return sigmoid(beta * dw) + sigmoid(-u)
        assert kind == "discopop"
        return sigmoid(-u / tau) * minus_log_sigmoid(u) + sigmoid(u / tau) * mp.exp(-u)

    if kind == "sft":
        losses = likelihood()
    elif kind in SORTED:
        n = (nw, nl) if by_length else ([1] * len(w), [1] * len(w))
        each = [[x / k for x, k in zip(c, n[j % 2], strict=True)] for j, c in enumerate((w, l, rw, rl))]
        second, third = (1, 2) if kind == "aot" else (2, 1)
        better = [a - b for a, b in zip(each[0], each[second], strict=True)]
        worse = [a - b for a, b in zip(each[third], each[3], strict=True)]
        losses = [smoothed(beta * (a - b)) for a, b in zip(sorted(better), sorted(worse), strict=True)]
    else:
        losses = [one(i) for i in pairs]
    if weights:
        losses = [a * b for a, b in zip(losses, weights, strict=True)]
    if sft_weight:
        losses = [a + sft_weight * b for a, b in zip(losses, likelihood(), strict=True)]
    return losses


def numbers(values: Tensor) -> Numbers:
    return [mp.mpf(x) for x in values.detach().double().tolist()]


def derivative(function: Callable[[Numbers], Any], at: Numbers) -> Numbers:
    """The gradient of a function of a few numbers, by central differences good to about 35 digits."""
    gradient = []
    for i, x in enumerate(at):
        step = (abs(x) or 1) * mp.mpf(10) ** -18
        up, down = (function([*at[:i], x + sign * step, *at[i + 1 :]]) for sign in (1, -1))
        gradient.append((up - down) / (2 * step))
    return gradient


def truth(
    kind: str, columns: list[Numbers], lengths: list[list[int]], upstream: Numbers, options: dict[str, Any]
) -> tuple[Numbers, list[Numbers]]:
    """The losses, and the gradients of their sum weighted by `upstream`, a column for every one of `columns`."""
    size = len(upstream)
    losses = definition(kind, columns, lengths, **options)
    together = [range(size)] if kind in (*SORTED, "sft") or options.get("sft_weight") else [[i] for i in range(size)]
    gradients = [[mp.mpf(0)] * size for _ in columns]
    for rows in together:
        part = {name: [v[i] for i in rows] if isinstance(v, list) else v for name, v in options.items()}
        n = [[side[i] for i in rows] for side in lengths]

        def total(flat: Numbers, rows: Sequence[int] = rows, part: dict[str, Any] = part, n: Any = n) -> Any:
            split = [flat[c * len(rows) : (c + 1) * len(rows)] for c in range(4)]
            each = definition(kind, split, n, **part)
            return sum(upstream[i] * x for i, x in zip(rows, each, strict=True))

        found = derivative(total, [column[i] for column in columns for i in rows])
        for position, value in enumerate(found):
            gradients[position // len(rows)][rows[position % len(rows)]] = value
    return losses, gradients


def allowed(right: Any, moved: Any, eps: float, floor: float, ulps: int) -> Any:
    """How far from `right`: eight times as far as `moved` is, and `ulps`, of `floor` at least."""
    return 8 * abs(moved - right) + ulps * eps * max(abs(right), floor)


def check(
    kind: str, columns: Sequence[Tensor], lengths: Sequence[Tensor], reduction: str = "none", *,
    gradient: bool = True, ulps: int = 8, **options: Any,
) -> None:  # fmt: skip
    """Hold `dpo_loss` against `definition`: each loss, the gradient of each log-prob, and the rewards."""
    leaves = [c.detach().clone().requires_grad_() for c in columns]
    size, dtype = len(leaves[0]), leaves[0].dtype
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if kind in (*NORMALISED, "sft") or options.get("length_normalize") or options.get("sft_weight"):
        options = {**options, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    result = dpo_loss(*leaves, loss_type=kind, reduction=reduction, **options)
    options = {name: value for name, value in options.items() if not name.endswith("_lengths")}
    options = {name: numbers(v) if isinstance(v, Tensor) else v for name, v in options.items()}

    share = mp.mpf(1) / size if reduction == "mean" and size else mp.mpf(1)
    steps = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    upstream = numbers(steps) if reduction == "none" else [share] * size
    exact = [numbers(c) for c in leaves]
    n = [side.tolist() for side in lengths]

    def answers(rounding: float) -> tuple[Numbers, list[Numbers]]:
        """The truth with every number, β too, moved by a rounding: h as far as it goes."""
        signs = [rounding * s for s in (1, -1, -1, 1)]
        moved = [[x + s * abs(x) for x in column] for s, column in zip(signs, exact, strict=True)]
        scalars = {**options, "beta": mp.mpf(options.get("beta", 0.1)) * (1 + rounding)}
        if gradient:
            values, slopes = truth(kind, moved, n, upstream, scalars)
        else:
            values, slopes = definition(kind, moved, n, **scalars), []
        return (values if reduction == "none" else [sum(x * share for x in values)]), slopes

    right, moved = answers(0.0), answers(eps)
    got = result.loss.detach().double().reshape(-1).tolist()
    assert len(got) == len(right[0])
    assert result.loss.shape == ((size,) if reduction == "none" else ())
    for i, value in enumerate(right[0]):
        limit = allowed(value, moved[0][i], eps, 1.0, ulps)
        assert abs(got[i] - value) <= limit, f"loss[{i}]: {got[i]!r}, wanted {mp.nstr(value, 17)}"

    beta = options.get("beta", 0.1)
    if gradient and size:
        result.loss.backward(steps.to(result.loss.dtype) if reduction == "none" else None)
        # Half a bf16 or fp16 ulp where the gradient is rounded to the leaf's own dtype.
        rounded = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0
        for name, c in (("w", 0), ("l", 1), ("rw", 2), ("rl", 3)):
            leaf = leaves[c]
            slopes = [0.0] * size if leaf.grad is None else leaf.grad.double().tolist()
            for i, value in enumerate(right[1][c]):
                limit = allowed(value, moved[1][c][i], eps, beta, ulps) + rounded * abs(value)
                assert abs(slopes[i] - value) <= limit, f"d{name}[{i}]: {slopes[i]!r}, wanted {mp.nstr(value, 17)}"

    zeros = kind in FREE or options.get("reference_free")
    for reward, a, b in ((result.chosen_rewards, 0, 2), (result.rejected_rewards, 1, 3)):
        assert reward.shape == (size,)
        assert not reward.requires_grad
        for i, value in enumerate(reward.double().tolist()):
            x, y = exact[a][i], mp.mpf(0) if zeros else exact[b][i]
            assert abs(value - beta * (x - y)) <= 4 * eps * beta * (abs(x) + abs(y))


def example(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """w, l, rw, rl of mean log-probs between -3 and -0.1, references within a few nats of them, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 20, (size,), generator=generator) for _ in range(2)]
    policy = [-(0.1 + 2.9 * torch.rand(size, generator=generator, dtype=torch.float64)) * n for n in lengths]
    reference = [x + 2 * torch.randn(size, generator=generator, dtype=torch.float64) for x in policy]
    return [x.to(dtype) for x in (*policy, *reference)], lengths


def choices(kind: str) -> list[dict[str, Any]]:
    """Every option that the type defines, one at a time, and a few together."""
    found: list[dict[str, Any]] = [{}, {"beta": 0.7}]
    if kind not in SORTED and kind != "sft":
        found.append({"weights": torch.tensor([0.5, 2.0, 0.0, 1.25, 3.0], dtype=torch.float64)})
    margin = torch.tensor([0.25, -1.0, 0.0, 2.5, 0.75], dtype=torch.float64)
    if kind in SMOOTHED:
        found += [{"label_smoothing": e} for e in (0.3, 1e-12)]
    if kind in MARGIN:
        found += [{"margin": margin}, {"margin": margin, "beta": 1.5}]
    if kind in DIVERGENCE:
        found += [{"f_divergence": name} for name in ("forward_kl", "js", "alpha")]
        found += [{"f_divergence": "alpha", "f_alpha": a} for a in (-0.5, 1.0, 2.0)]
    if kind in DIVISIBLE:
        found.append({"length_normalize": True, "beta": 2.0})
    if kind in DIVISIBLE and kind in DIVERGENCE:
        found.append({"length_normalize": True, "f_divergence": "js", "beta": 2.0})
    if kind not in FREE:
        found.append({"reference_free": True, "beta": 0.02})
    if kind == "bco_pair":
        found += [{"delta": 0.75}, {"delta": -1.5}]
    if kind == "simpo":
        found += [{"gamma": 0.0}, {"gamma": 1.75, "beta": 2.5, "margin": margin}]
    if kind == "discopop":
        found += [{"discopop_tau": 1.0}, {"discopop_tau": 3.0, "beta": 0.5}]
    if kind == "sigmoid":
        found.append({"label_smoothing": 0.2, "margin": margin, "f_divergence": "alpha", "f_alpha": 0.25})
        found += [{"label_smoothing": 0.5}, {"label_smoothing": 1.0}]
    return [{**required(kind), **options} for options in found]


CASES = [
    pytest.param(kind, options, id="-".join([kind, *(f"{k}={'each' if isinstance(v, Tensor) else v}"
                                                     for k, v in options.items())]))
    for kind in TYPES for options in choices(kind)
]  # fmt: skip


class TestDefinitions:
    @pytest.mark.parametrize(("kind", "options"), CASES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_random(self, kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
        columns, lengths = example(5, dtype=dtype)
        options = {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in options.items()}
        # How the likelihood of a batch is shared among its sequences is nobody's business; its mean is.
        check(kind, columns, lengths, "mean" if kind == "sft" else "none", **options)

    @every_type
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_is_computed_in_float32(self, kind: str, dtype: torch.dtype) -> None:
        columns, lengths = example(5, 1, dtype)
        check(kind, columns, lengths, "mean", **required(kind))
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        got = dpo_loss(*columns, loss_type=kind, **required(kind), **n)
        assert {x.dtype for x in got} == {torch.float32}
        wide = dpo_loss(*(c.float() for c in columns), loss_type=kind, **required(kind), **n)
        for a, b in zip(got, wide, strict=True):
            assert torch.equal(a, b)

    @every_type
    @pytest.mark.parametrize("size", [0, 1])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_small_batches(self, kind: str, size: int, reduction: str) -> None:
        columns, lengths = example(size, 2)
        check(kind, columns, lengths, reduction, **required(kind))
        leaves = [c.requires_grad_() for c in columns[:2]]
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        loss = dpo_loss(*leaves, *columns[2:], loss_type=kind, reduction=reduction, **required(kind), **n).loss
        if size == 0:
            assert loss.sum().item() == 0
            for gradient in torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True):
                assert gradient.shape == (0,)

    @every_type
    def test_reductions_agree(self, kind: str) -> None:
        columns, lengths = example(7, 3)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        weight = 0.0 if kind == "sft" else 0.25
        each, total, mean = (
            dpo_loss(*columns, loss_type=kind, reduction=how, sft_weight=weight, **required(kind), **n).loss
            for how in ("none", "sum", "mean")
        )
        assert each.shape == (7,)
        torch.testing.assert_close(total, each.sum(), rtol=1e-14, atol=0)
        torch.testing.assert_close(mean, each.sum() / 7, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "sft"])
    def test_gradcheck(self, kind: str) -> None:
        columns, lengths = example(4, 4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "sft_weight": 0.5, "beta": 0.5}
        leaves = [c.requires_grad_() for c in columns]
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda *x, how=reduction: dpo_loss(*x, loss_type=kind, reduction=how, **required(kind), **n).loss,
                leaves,
            )


LOG2, LOG3 = math.log(2), math.log(3)
ROW = math.log(4 / 3)  # -log sigmoid(log 3)


def point(
    kind: str, ratios: tuple[float, float], wanted: float, beta: float = 1.0, n: tuple[int, int] = (1, 1), **more: Any
) -> Any:
    """One pair of log-ratios, and its loss worked out by hand. They are log-probs where there is no reference."""
    name = ", ".join([kind, str(ratios), *(f"{k}={v}" for k, v in more.items())])
    return pytest.param(kind, ratios, wanted, {"beta": beta, **more}, n, id=name)


BY_HAND = [
    point("sigmoid", (0.0, 0.0), LOG2),
    point("sigmoid", (LOG3, 0.0), ROW),
    point("sigmoid", (0.0, 1.0), -math.log(1 / (math.e + 1))),
    point("sigmoid", (1.0, 0.0), -math.log(math.e / (math.e + 1))),
    point("sigmoid", (0.0, LOG2), -math.log(1 / 3)),
    point("sigmoid", (LOG3, 0.0), 0.75 * ROW + 0.25 * math.log(4), label_smoothing=0.25),
    point("sigmoid", (LOG3, 0.0), LOG2, margin=torch.tensor([LOG3], dtype=torch.float64)),
    # f(-log 2) = 1 - 2; f(log 3) = log 2 + log(3/4); f(log 4) = (1/2 - 1)/(-1/2) and (4 - 1)/1
    point("sigmoid", (0.0, -LOG2), -math.log(math.e / (math.e + 1)), f_divergence="forward_kl"),
    point("sigmoid", (LOG3, 0.0), math.log(5 / 3), f_divergence="js"),
    point("sigmoid", (math.log(4), 0.0), -math.log(math.e / (math.e + 1)), f_divergence="alpha"),
    point("sigmoid", (math.log(4), 0.0), math.log1p(math.exp(-3)), f_divergence="alpha", f_alpha=2.0),
    point("robust", (LOG3, 0.0), (0.75 * ROW - 0.25 * math.log(4)) / 0.5, label_smoothing=0.25),
    point("hinge", (0.25, 0.0), 0.75),
    point("hinge", (2.0, 0.0), 0.0),
    point("hinge", (-3.0, 1.0), 3.0, beta=0.5),
    point("ipo", (3.0, 0.0), 4.0, beta=0.5),
    point("ipo", (6.0, -4.0), 9.0, beta=0.5, n=(2, 4), length_normalize=True),
    point("sigmoid_norm", (2 * LOG3, 0.0), ROW, n=(2, 7)),
    point("exo_pair", (0.0, 0.0), 0.5 * math.log(4 / 3), label_smoothing=0.25),
    point("exo_pair", (LOG3, 0.0), 0.0, label_smoothing=0.25),
    point("nca_pair", (LOG3, 0.0), ROW + 0.5 * math.log(4) + 0.5 * LOG2),
    point("bco_pair", (LOG3, -LOG3), 2 * ROW),
    point("bco_pair", (LOG3, -LOG3), LOG2 + math.log(10 / 9), delta=LOG3),
    point("sppo_hard", (3.0, 1.0), 8.0, beta=0.5),
    point("apo_zero", (LOG3, 0.0), 0.75),
    point("apo_down", (LOG3, 0.0), 1.0),
    point("apo_down", (LOG3, LOG3), 1.25),
    point("discopop", (LOG3, 0.0), 0.25 * ROW + 0.25, discopop_tau=1.0),
    point("discopop", (LOG3, 0.0), 0.1 * ROW + 0.3, discopop_tau=0.5),
    point("discopop", (0.0, 0.0), 0.5 * LOG2 + 0.5),
    point("aot", (LOG3, 0.0), ROW),
    point("aot_unpaired", (LOG3, 0.0), ROW),
    point("simpo", (-2 * LOG2, -math.log(6)), LOG2, n=(2, 1), gamma=LOG3),
    point("simpo", (-2 * LOG2, -math.log(6)), ROW, n=(2, 1), gamma=0.0),
    point("cpo", (-1.0, -1.0 - LOG3), ROW),
    # Odds of 3 and of 1.
    point("orpo", (3 * math.log(0.75), 2 * math.log(0.5)), 0.5 * ROW, beta=0.5, n=(3, 2)),
    point("sft", (-6.0, -1.0), 1.5, n=(4, 1)),
]


class TestByHand:
    @pytest.mark.parametrize(("kind", "ratios", "wanted", "options", "n"), BY_HAND)
    def test_one_pair(
        self, kind: str, ratios: tuple[float, float], wanted: float, options: dict[str, Any], n: tuple[int, int]
    ) -> None:
        reference = (0.0, 0.0) if kind in FREE else (-1.5, -2.25)
        values = (ratios[0] + reference[0], ratios[1] + reference[1], *reference)
        columns = [torch.tensor([x], dtype=torch.float64) for x in values]
        lengths = {"chosen_lengths": torch.tensor([n[0]]), "rejected_lengths": torch.tensor([n[1]])}
        got = dpo_loss(*columns, loss_type=kind, **lengths, **options)
        assert got.loss.item() == pytest.approx(wanted, rel=1e-14, abs=1e-15)
        assert got.chosen_rewards.item() == pytest.approx(options["beta"] * ratios[0], rel=1e-14, abs=1e-15)
        assert got.rejected_rewards.item() == pytest.approx(options["beta"] * ratios[1], rel=1e-14, abs=1e-15)

    def test_defaults(self) -> None:
        x = torch.tensor([10 * LOG3], dtype=torch.float64)
        zero = torch.zeros_like(x)
        assert dpo_loss(x, zero, zero, zero).loss.item() == pytest.approx(ROW)
        assert dpo_loss(x, zero, zero, zero, loss_type="discopop").loss.item() == pytest.approx(
            3**-20 / (1 + 3**-20) * ROW + 1 / (1 + 3**-20) / 3
        )
        one = torch.ones(1, dtype=torch.long)
        simpo = dpo_loss(x - 20, zero - 20, loss_type="simpo", chosen_lengths=one, rejected_lengths=one)
        assert simpo.loss.item() == pytest.approx(math.log1p(math.exp(0.5) / 3))

    def test_sorting_mixes_the_pairs(self) -> None:
        zero = torch.zeros(2, dtype=torch.float64)
        w, rw = torch.tensor([2 * LOG3, LOG3], dtype=torch.float64), torch.tensor([0, LOG3], dtype=torch.float64)
        got = dpo_loss(w, zero, rw, zero, loss_type="aot", beta=1.0, reduction="none")
        assert got.loss.tolist() == pytest.approx([ROW, ROW])
        assert got.chosen_rewards.tolist() == pytest.approx([2 * LOG3, 0.0])
        got = dpo_loss(rw, zero, zero, zero, loss_type="aot_unpaired", beta=1.0, reduction="none")
        assert sorted(got.loss.tolist()) == pytest.approx([ROW, LOG2])


class TestExtremes:
    @pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in FREE])
    @pytest.mark.parametrize("u", [20.0, 100.0, 1e3, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_large_ratios(self, kind: str, u: float, dtype: torch.dtype) -> None:
        ratios = torch.tensor([[u, 0], [-u, 0], [0, u], [0, -u], [u, 3 - u], [-u, u - 3], [u, u - 1]], dtype=dtype)
        policy, reference = ratios.clamp(max=0), -ratios.clamp(min=0)
        columns = [*policy.T, *reference.T]
        lengths = [torch.ones(7, dtype=torch.long)] * 2
        if kind in SORTED:  # without ties, of which each may be the first
            columns = [c - torch.arange(7, dtype=dtype) / n for c, n in zip(columns, (8, 16, 4, 32), strict=True)]
        check(kind, columns, lengths, beta=1.0, **required(kind))

    @pytest.mark.parametrize("kind", ["simpo", "cpo"])
    @pytest.mark.parametrize("u", [100.0, 1e3, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_large_without_a_reference(self, kind: str, u: float, dtype: torch.dtype) -> None:
        w, zero = torch.tensor([-u, 0, -u, -0.5], dtype=dtype), torch.zeros(4, dtype=dtype)
        l = torch.tensor([0, -u, -u, -0.25], dtype=dtype)  # noqa: E741
        check(kind, [w, l, zero, zero], [torch.ones(4).long()] * 2, beta=1.0)

    @pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "cpo", "simpo", "aot", "aot_unpaired"])
    @pytest.mark.parametrize("u", [20.0, 50.0, 85.0])
    def test_tails_keep_their_digits(self, kind: str, u: float) -> None:
        w, zero, one = torch.tensor([u]).requires_grad_(), torch.zeros(1), torch.ones(1, dtype=torch.long)
        options = {"chosen_lengths": one, "rejected_lengths": one, **({"gamma": 0.0} if kind == "simpo" else {})}
        loss = dpo_loss(w, zero, zero, zero, loss_type=kind, beta=1.0, **options).loss
        assert loss.item() == pytest.approx(math.exp(-u), rel=1e-5)
        assert torch.autograd.grad(loss, w)[0].item() == pytest.approx(-math.exp(-u), rel=1e-5)

    @pytest.mark.parametrize("u", [1e1, 88.0, 1e2, 1e3, 1e4])
    @pytest.mark.parametrize("tau", [0.05, 0.5, 1.0, 2.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_discopop(self, u: float, tau: float, dtype: torch.dtype) -> None:
        # Towards -∞ the loss is -u + exp(u/τ - u), out of reach for τ > 1 past here.
        if tau > 1 and u > 150:
            u = 150.0
        w, zero = torch.tensor([u, -u, u / 2, -u / 2], dtype=dtype), torch.zeros(4, dtype=dtype)
        check("discopop", [w, zero, zero, zero], [torch.ones(4).long()] * 2, beta=1.0, discopop_tau=tau)

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge", "exo_pair", "discopop"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize(
        ("name", "alpha", "ratios"),
        [
            ("forward_kl", 0.5, [(60.0, -60.0), (0, -85), (85, 0), (1e4, 1e4), (1e4, 0), (0, 1e4)]),
            ("forward_kl", 0.5, [(0.0, -1e3), (0, -1e4), (1e4, -1e4)]),
            ("js", 0.5, [(1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4), (1e4, 1e4), (0, 100), (100, 0)]),
            ("alpha", 0.5, [(60.0, -60.0), (0, -170), (1e4, 1e4), (1e4, 0), (0, 1e4)]),
            ("alpha", 0.5, [(0.0, -1e3), (0, -1e4), (1e4, -1e4)]),
            ("alpha", 2.0, [(60.0, -60.0), (85, 0), (-1e4, -1e4), (0, -1e4)]),
            ("alpha", 2.0, [(1e3, 0.0), (1e4, 0)]),
            ("alpha", 1 + 1e-4, [(1.0, 0.5), (1e-3, 0), (1e4, 0), (0, 1e4)]),
            ("alpha", 1 - 1e-7, [(1.0, 0.5), (1e-3, 0), (-1e-6, 0)]),
        ],
    )
    def test_divergences(
        self, kind: str, name: str, alpha: float, ratios: list[tuple[float, float]], dtype: torch.dtype
    ) -> None:
        """Wherever the loss is within float32's range, also where f is not; the gradient too, which is 0 there."""
        w, l = torch.tensor(ratios, dtype=dtype).T  # noqa: E741
        zero = torch.zeros_like(w)
        more = {"f_alpha": alpha} if name == "alpha" else {}
        check(kind, [w, l, zero, zero], [torch.ones(len(w)).long()] * 2, f_divergence=name, **more, **required(kind))

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge", "exo_pair", "discopop"])
    @pytest.mark.parametrize(
        ("name", "alpha", "ratios"),
        [
            ("forward_kl", 0.5, [(-100.0, -200.0), (-150, -151), (-95, -1e4)]),
            ("alpha", 0.5, [(-200.0, -400.0), (-300, -302), (-190, -1e4)]),
            ("alpha", 2.0, [(200.0, 100.0), (151, 150), (1e4, 95)]),
        ],
    )
    def test_divergences_beyond_float32_on_both_sides(
        self, kind: str, name: str, alpha: float, ratios: list[tuple[float, float]]
    ) -> None:
        """f is out of range for both, and so is how far apart they are: no pair is more surely in order."""
        w, l = torch.tensor(ratios).T  # noqa: E741
        zero = torch.zeros_like(w)
        more = {"f_alpha": alpha} if name == "alpha" else {}
        check(kind, [w, l, zero, zero], [torch.ones(len(w)).long()] * 2, f_divergence=name, **more, **required(kind))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("n", [1, 5])
    def test_orpo_near_certainty(self, dtype: torch.dtype, n: int) -> None:
        small, half = [-1e-9, -1e-30, -1e-9, -1e-30, -0.3, -2.0], [-0.7, -0.7, -1e-9, -1e-9, -1e-30, -1e-9]
        w, l = torch.tensor(small, dtype=dtype) * n, torch.tensor(half, dtype=dtype) * n  # noqa: E741
        zero = torch.zeros(6, dtype=dtype)
        # Log-odds near 70 have ulp of 70, and the slope goes as their exponential.
        check("orpo", [w, l, zero, zero], [torch.full((6,), n)] * 2, ulps=128)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_orpo_at_certainty(self, dtype: torch.dtype) -> None:
        """At p = 1 for the chosen the loss is 0 and its slope -β·odds(rejected)/n; elsewhere it is no NaN."""
        w, l = (torch.tensor(x, dtype=dtype).requires_grad_() for x in ([0.0, -0.5, 0.0], [-1.4, 0.0, 0.0]))  # noqa: E741
        n = {"chosen_lengths": torch.tensor([4, 4, 4]), "rejected_lengths": torch.tensor([2, 2, 2])}
        loss = dpo_loss(w, l, loss_type="orpo", beta=0.5, reduction="none", **n).loss
        gradients = torch.autograd.grad(loss.sum(), (w, l))
        assert loss[0].item() == pytest.approx(0, abs=1e-12)
        odds = math.exp(-0.7) / -math.expm1(-0.7)
        assert gradients[0][0].item() == pytest.approx(-0.5 * odds / 4, rel=1e-5)
        assert gradients[1][0].item() == pytest.approx(0, abs=1e-12)
        assert loss[1].item() > 5  # beyond what -1e-9 would cost
        assert not loss.isnan().any()
        assert not any(g.isnan().any() for g in gradients)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize(
        ("kind", "eps"),
        [("sigmoid", 1e-30), ("sigmoid", 0.5), ("robust", 1e-30), ("robust", 0.49), ("robust", 0.49999),
         ("exo_pair", 1e-9), ("exo_pair", 1e-300), ("exo_pair", 0.5), ("exo_pair", 1 - 1e-9), ("aot", 0.5),
         ("aot_unpaired", 1e-30)],
    )  # fmt: skip
    def test_label_smoothing_at_its_limits(self, kind: str, eps: float, dtype: torch.dtype) -> None:
        columns, lengths = example(5, 6, dtype)
        # The terms of robust cancel: its truth is measured by them.
        if kind == "robust" and eps > 0.4:
            columns = [c.double() for c in columns]
        check(kind, columns, lengths, label_smoothing=eps, beta=0.5)

    @every_type
    def test_lengths_of_zero_are_one(self, kind: str) -> None:
        columns, lengths = example(4, 7)
        lengths[0][1] = lengths[1][2] = 0
        if kind != "orpo":  # whose log-odds at no token at all are infinite
            columns[0][1] = columns[1][2] = 0.0
        norm = {"length_normalize": True} if kind in DIVISIBLE else {}
        check(kind, columns, lengths, "mean", **norm, **required(kind))
        added = {} if kind == "sft" else {"sft_weight": 0.5, **norm}
        for how in ("token", "sequence"):
            check(kind, columns, lengths, "mean", sft_reduction=how, **added, **required(kind))

    def test_hinge_and_ipo_are_exact(self) -> None:
        w, zero = torch.tensor([1e4, -1e4]), torch.zeros(2)
        assert dpo_loss(w, zero, zero, zero, loss_type="hinge", beta=1.0, reduction="none").loss.tolist() == [0, 10001]
        got = dpo_loss(w, zero, zero, zero, loss_type="ipo", beta=0.5, reduction="none").loss
        assert got.tolist() == pytest.approx([9999.0**2, 10001.0**2], rel=1e-7)


class TestSft:
    w, n = torch.tensor([-4.0, -6.0], dtype=torch.float64), torch.tensor([2, 8])

    @pytest.mark.parametrize(("reduction", "wanted", "slope"), [
        ("token", 1.0, [-0.1, -0.1]), ("sequence", 1.375, [-1 / 4, -1 / 16]),
    ])  # fmt: skip
    def test_alone(self, reduction: str, wanted: float, slope: list[float]) -> None:
        w = self.w.clone().requires_grad_()
        result = dpo_loss(w, w - 1, loss_type="sft", chosen_lengths=self.n, sft_reduction=reduction)
        assert result.loss.item() == pytest.approx(wanted, rel=1e-14)
        assert torch.autograd.grad(result.loss, w)[0].tolist() == pytest.approx(slope, rel=1e-14)
        assert result.chosen_rewards.tolist() == pytest.approx([-0.4, -0.6])

    def test_needs_no_lengths_of_the_rejected(self) -> None:
        zero = torch.zeros(2, dtype=torch.float64)
        got = dpo_loss(self.w, zero, zero, zero, sft_weight=0.5, chosen_lengths=self.n)
        plain = dpo_loss(self.w, zero, zero, zero)
        assert got.loss.item() == pytest.approx(plain.loss.item() + 0.5, rel=1e-14)

    @pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "sft"])
    @pytest.mark.parametrize("how", ["token", "sequence"])
    def test_added(self, kind: str, how: str) -> None:
        columns, lengths = example(4, 8)
        check(kind, columns, lengths, "mean", sft_weight=0.75, sft_reduction=how, **required(kind))

    @pytest.mark.parametrize("how", ["token", "sequence"])
    @pytest.mark.parametrize("loss", [{"loss_type": "sft"}, {"sft_weight": 2.0}])
    def test_mean_of_each_is_the_mean(self, how: str, loss: dict[str, Any]) -> None:
        columns, lengths = example(4, 9)
        options = {**loss, "sft_reduction": how, "chosen_lengths": lengths[0]}
        leaf = columns[0].requires_grad_()
        results = {r: dpo_loss(leaf, *columns[1:], reduction=r, **options).loss for r in ("none", "sum", "mean")}
        slopes = {r: torch.autograd.grad(x.sum(), leaf)[0] for r, x in results.items()}
        torch.testing.assert_close(results["none"].sum() / 4, results["mean"], rtol=1e-14, atol=0)
        torch.testing.assert_close(results["sum"] / 4, results["mean"], rtol=1e-14, atol=0)
        torch.testing.assert_close(slopes["none"] / 4, slopes["mean"], rtol=1e-14, atol=0)
        torch.testing.assert_close(slopes["sum"] / 4, slopes["mean"], rtol=1e-14, atol=0)

    @pytest.mark.parametrize("n", [[0, 4], [0, 0]])
    def test_no_tokens(self, n: list[int]) -> None:
        w = torch.tensor([0.0, -8.0 if n[1] else 0.0])
        token = dpo_loss(w, w, loss_type="sft", chosen_lengths=torch.tensor(n)).loss
        each = dpo_loss(w, w, loss_type="sft", chosen_lengths=torch.tensor(n), sft_reduction="sequence").loss
        # Both tokens means count four tokens, not a fifth for the empty sequence.
        assert (token.item(), each.item()) == ((2.0, 1.0) if n[1] else (0.0, 0.0))


class TestOptions:
    def test_weights_multiply_and_the_mean_divides_by_the_batch(self) -> None:
        columns, _ = example(4)
        weights = torch.tensor([0.0, 3.0, 0.5, 0.5], dtype=torch.float64).requires_grad_()
        plain = dpo_loss(*columns, reduction="none").loss
        got = dpo_loss(*(c.requires_grad_() for c in columns), weights=weights)
        torch.testing.assert_close(got.loss, (plain * weights).sum() / 4, rtol=1e-14, atol=0)
        got.loss.backward()
        assert weights.grad is None
        assert columns[0].grad is not None
        assert columns[0].grad[0] == 0

    def test_weights_leave_the_rewards_alone(self) -> None:
        columns, _ = example(3)
        plain, weighted = dpo_loss(*columns), dpo_loss(*columns, weights=torch.tensor([0.0, 2.0, 3.0]).double())
        assert torch.equal(plain.chosen_rewards, weighted.chosen_rewards)
        assert torch.equal(plain.rejected_rewards, weighted.rejected_rewards)

    @pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in FREE])
    def test_reference_free_ignores_what_is_given(self, kind: str) -> None:
        columns, lengths = example(4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        options = {"loss_type": kind, "reduction": "none", **required(kind), **n}
        zeros = [torch.zeros(4, dtype=torch.float64)] * 2
        wanted = dpo_loss(*columns[:2], *zeros, **options)
        for got in (
            dpo_loss(*columns[:2], reference_free=True, **options),
            dpo_loss(*columns, reference_free=True, **options),
        ):
            for a, b in zip(wanted, got, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("kind", FREE)
    def test_types_without_a_reference_ignore_it(self, kind: str) -> None:
        columns, lengths = example(4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        with_it = dpo_loss(*columns, loss_type=kind, **n)
        without = dpo_loss(*columns[:2], loss_type=kind, **n)
        for a, b in zip(with_it, without, strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(with_it.chosen_rewards, 0.1 * columns[0])
        torch.testing.assert_close(with_it.rejected_rewards, 0.1 * columns[1])

    @pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in FREE])
    def test_the_others_need_it(self, kind: str) -> None:
        columns, lengths = example(2)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        with pytest.raises(ValueError, match=rf"(?s){kind}.*ref_chosen_logps.*reference_free"):
            dpo_loss(*columns[:2], loss_type=kind, **required(kind), **n)
        with pytest.raises(ValueError, match=rf"(?s){kind}.*ref_rejected_logps.*reference_free"):
            dpo_loss(*columns[:3], loss_type=kind, **required(kind), **n)

    def test_a_list_with_one_that_needs_it(self) -> None:
        columns, lengths = example(2)
        with pytest.raises(ValueError, match=r"ref_chosen_logps"):
            dpo_loss(*columns[:2], loss_type=["sft", "hinge"], chosen_lengths=lengths[0])

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge", "discopop", "robust", "exo_pair"])
    def test_rewards_are_not_transformed(self, kind: str) -> None:
        columns, lengths = example(4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], **required(kind)}
        for more in ({"f_divergence": "js"}, {"length_normalize": True}, {"margin": torch.ones(4).double()}):
            got = dpo_loss(*(c.requires_grad_() for c in columns), loss_type=kind, beta=0.3, **more, **n)
            torch.testing.assert_close(got.chosen_rewards, 0.3 * (columns[0] - columns[2]).detach())
            torch.testing.assert_close(got.rejected_rewards, 0.3 * (columns[1] - columns[3]).detach())
            assert not got.chosen_rewards.requires_grad
            assert not got.rejected_rewards.requires_grad

    @pytest.mark.parametrize("more", [{}, {"f_divergence": "js"}, {"margin": torch.tensor([0.5, 1, 2, 3]).double()}])
    def test_normalised_sigmoid_is_sigmoid_norm(self, more: dict[str, Any]) -> None:
        columns, lengths = example(4)
        options = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "reduction": "none", **more}
        wanted = dpo_loss(*columns, loss_type="sigmoid_norm", **options)
        assert not torch.equal(wanted.loss, dpo_loss(*columns, **options).loss)
        for a, b in zip(wanted, dpo_loss(*columns, length_normalize=True, **options), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("kind", NORMALISED)
    def test_normalising_is_implied(self, kind: str) -> None:
        columns, lengths = example(4)
        options = {"loss_type": kind, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        implied, said = dpo_loss(*columns, **options), dpo_loss(*columns, length_normalize=True, **options)
        for a, b in zip(implied, said, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("kind", [kind for kind in DIVISIBLE if kind not in FREE])
    def test_normalising_is_dividing_what_is_given(self, kind: str) -> None:
        columns, lengths = example(5)
        shared = {"reduction": "none", **required(kind)}
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        got = dpo_loss(*columns, loss_type=kind, length_normalize=True, **n, **shared).loss
        divided = [c / lengths[i % 2] for i, c in enumerate(columns)]
        plain = "sigmoid" if kind == "sigmoid_norm" else kind
        torch.testing.assert_close(got, dpo_loss(*divided, loss_type=plain, **shared).loss, rtol=1e-12, atol=1e-12)

    def test_lengths_of_any_integer_dtype(self) -> None:
        columns, lengths = example(4)
        wanted = dpo_loss(*columns, loss_type="ipo", length_normalize=True, chosen_lengths=lengths[0],
                          rejected_lengths=lengths[1]).loss  # fmt: skip
        narrow = [n.int() for n in lengths]
        got = dpo_loss(*columns, loss_type="ipo", length_normalize=True, chosen_lengths=narrow[0],
                       rejected_lengths=narrow[1]).loss  # fmt: skip
        assert torch.equal(got, wanted)

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize(("kinds", "weights"), [
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]),
        (["hinge", "ipo"], None),
        (("apo_zero", "aot"), (2.0, -0.5)),
        (["simpo", "orpo"], [1.0, 0.0]),
        (["discopop"], [0.25]),
        (["sigmoid", "sigmoid"], [0.5, 0.25]),
    ])  # fmt: skip
    def test_lists_are_weighted_sums(self, kinds: Sequence[str], weights: Any, reduction: str) -> None:
        columns, lengths = example(4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "reduction": reduction}
        leaves = [c.requires_grad_() for c in columns]
        got = dpo_loss(*leaves, loss_type=kinds, loss_weights=weights, **n)
        parts = [dpo_loss(*leaves, loss_type=kind, **n).loss for kind in kinds]
        wanted = sum(x * part for x, part in zip(weights or [1.0] * len(kinds), parts, strict=True))
        torch.testing.assert_close(got.loss, wanted, rtol=1e-13, atol=1e-14)
        slopes = [torch.autograd.grad(x.sum(), leaves, allow_unused=True, materialize_grads=True)
                  for x in (got.loss, wanted)]  # fmt: skip
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)
        against = [0.0 * columns[2], 0.0 * columns[3]] if set(kinds) <= set(FREE) else columns[2:]
        torch.testing.assert_close(got.chosen_rewards, (0.1 * (columns[0] - against[0])).detach())
        torch.testing.assert_close(got.rejected_rewards, (0.1 * (columns[1] - against[1])).detach())

    def test_sft_weight_is_added_to_a_list_once(self) -> None:
        columns, lengths = example(4)
        plain = dpo_loss(*columns, loss_type=["sigmoid", "hinge"], loss_weights=[0.5, 2.0]).loss
        likelihood = dpo_loss(*columns, loss_type="sft", chosen_lengths=lengths[0]).loss
        got = dpo_loss(*columns, loss_type=["sigmoid", "hinge"], loss_weights=[0.5, 2.0], sft_weight=0.25,
                       chosen_lengths=lengths[0]).loss  # fmt: skip
        torch.testing.assert_close(got, plain + 0.25 * likelihood, rtol=1e-14, atol=0)


class TestSorted:
    @pytest.mark.parametrize("kind", SORTED)
    def test_mean_of_the_ranks_is_the_mean(self, kind: str) -> None:
        columns, _ = example(6)
        each = dpo_loss(*columns, loss_type=kind, reduction="none").loss
        assert each.shape == (6,)
        assert not torch.allclose(each, dpo_loss(*columns, reduction="none").loss)
        torch.testing.assert_close(dpo_loss(*columns, loss_type=kind).loss, each.mean(), rtol=1e-14, atol=0)

    @pytest.mark.parametrize("kind", SORTED)
    def test_each_sides_order_does_not_count(self, kind: str) -> None:
        (w, l, rw, rl), _ = example(6)  # noqa: E741
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        moved = (w[order], l[order], rw, rl) if kind == "aot" else (w[order], l, rw[order], rl)
        wanted = dpo_loss(w, l, rw, rl, loss_type=kind).loss
        torch.testing.assert_close(dpo_loss(*moved, loss_type=kind).loss, wanted, rtol=1e-14, atol=0)
        plain = dpo_loss(w, l, rw, rl).loss
        assert not torch.allclose(dpo_loss(*moved).loss, plain)

    @pytest.mark.parametrize("kind", SORTED)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_all_tied(self, kind: str, dtype: torch.dtype) -> None:
        leaves = [torch.full((5,), x, dtype=dtype).requires_grad_() for x in (-3.0, -4.0, -5.0, -6.0)]
        loss = dpo_loss(*leaves, loss_type=kind, beta=1.0).loss
        assert loss.item() == pytest.approx(LOG2, rel=1e-6)
        slopes = torch.autograd.grad(loss, leaves)
        # Whichever comes first, each is matched with one.
        for slope, wanted in zip(slopes, (-0.1, 0.1, 0.1, -0.1), strict=True):
            assert slope.tolist() == pytest.approx([wanted] * 5, rel=1e-6)

    @pytest.mark.parametrize("kind", SORTED)
    def test_one_pair_is_sigmoid(self, kind: str) -> None:
        columns, _ = example(1)
        got = dpo_loss(*columns, loss_type=kind, label_smoothing=0.2).loss
        torch.testing.assert_close(got, dpo_loss(*columns, label_smoothing=0.2).loss, rtol=1e-14, atol=0)


margin = {"margin": torch.ones(2)}
REFUSED = [
    *(("gamma", kind, {"gamma": 1.0}) for kind in ("sigmoid", "cpo", "orpo")),
    *(("delta", kind, {"delta": 0.5}) for kind in ("sigmoid", "nca_pair")),
    *(("discopop_tau", kind, {"discopop_tau": 0.1}) for kind in ("ipo", "sigmoid")),
    *(("margin", kind, margin) for kind in TYPES if kind not in MARGIN),
    *(("f_divergence", kind, {"f_divergence": "js"}) for kind in (*FREE, "aot")),
    *(("weights", kind, {"weights": torch.ones(2)}) for kind in SORTED),
    *(("label_smoothing", kind, {"label_smoothing": 0.1}) for kind in TYPES if kind not in SMOOTHED),
]


class TestRefusals:
    @pytest.mark.parametrize(("option", "kind", "options"), REFUSED, ids=[f"{o}-{k}" for o, k, _ in REFUSED])
    def test_options_without_a_meaning(self, option: str, kind: str, options: dict[str, Any]) -> None:
        x, n = torch.tensor([-1.0, -2.0]), torch.tensor([3, 4])
        more = {**required(kind), **options}
        lengths = {"chosen_lengths": n, "rejected_lengths": n}
        dpo_loss(x, x - 1, x, x, loss_type=kind, **required(kind), **lengths)
        with pytest.raises(ValueError, match=rf"(?s){option}.*\b{kind}\b|\b{kind}\b.*{option}"):
            dpo_loss(x, x - 1, x, x, loss_type=kind, **more, **lengths)

    @pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js"])
    def test_alpha_of_another_divergence(self, name: str) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=rf"(?s)f_alpha.*{name}|{name}.*f_alpha"):
            dpo_loss(x, x, x, x, f_divergence=name, f_alpha=0.25)

    @pytest.mark.parametrize(("kind", "eps"), [
        ("robust", 0.5), ("robust", 0.75), ("robust", 1.0), ("exo_pair", 0.0), ("exo_pair", 1.0),
    ])  # fmt: skip
    def test_label_smoothing_out_of_range(self, kind: str, eps: float) -> None:
        x = torch.zeros(2)
        both = rf"(label_smoothing.*{kind}|{kind}.*label_smoothing)"
        with pytest.raises(ValueError, match=rf"(?s){both}.*{re.escape(str(eps))}"):
            dpo_loss(x, x, x, x, loss_type=kind, label_smoothing=eps)

    @pytest.mark.parametrize("kind", NORMALISED)
    def test_lengths_missing(self, kind: str) -> None:
        x, n = torch.full((2,), -1.0), torch.ones(2, dtype=torch.long)
        with pytest.raises(ValueError, match=rf"(?s){kind}.*chosen_lengths|chosen_lengths.*{kind}"):
            dpo_loss(x, x, x, x, loss_type=kind, rejected_lengths=n)
        with pytest.raises(ValueError, match=rf"(?s){kind}.*rejected_lengths|rejected_lengths.*{kind}"):
            dpo_loss(x, x, x, x, loss_type=kind, chosen_lengths=n)

    @pytest.mark.parametrize(
        "options",
        [{"length_normalize": True}, {"sft_weight": 0.5}, {"loss_type": "sft"}, {"loss_type": ["hinge", "sft"]}],
    )
    def test_lengths_missing_for_an_option(self, options: dict[str, Any]) -> None:
        x = torch.zeros(2)
        name = "length_normalize" if "length_normalize" in options else "sft"
        with pytest.raises(ValueError, match=rf"(?s){name}.*chosen_lengths|chosen_lengths.*{name}"):
            dpo_loss(x, x, x, x, **options)

    @pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], []])
    def test_loss_weights_of_another_number(self, weights: list[float]) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=rf"loss_weights.*2.*{re.escape(str(weights))}"):
            dpo_loss(x, x, x, x, loss_type=["sigmoid", "hinge"], loss_weights=weights)

    def test_loss_weights_of_no_list(self) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match="loss_weights"):
            dpo_loss(x, x, x, x, loss_weights=[0.5, 0.5])
        with pytest.raises(ValueError, match="loss_type"):
            dpo_loss(x, x, x, x, loss_type=[])

    @pytest.mark.parametrize(
        ("options", "listed"),
        [
            ({"loss_type": "dpo"}, TYPES),
            ({"loss_type": ["sigmoid", "dpo"]}, TYPES),
            ({"f_divergence": "dpo"}, ("reverse_kl", "forward_kl", "js", "alpha")),
            (
                {"sft_weight": 1.0, "sft_reduction": "dpo", "chosen_lengths": torch.ones(2).long()},
                ("token", "sequence"),
            ),
        ],
        ids=["loss_type", "loss_type in a list", "f_divergence", "sft_reduction"],
    )
    def test_unknown_names(self, options: dict[str, Any], listed: Sequence[str]) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match="'dpo'") as raised:
            dpo_loss(x, x, x, x, **options)
        for name in listed:
            assert f"'{name}'" in str(raised.value)

    @pytest.mark.parametrize("name", ["margin", "weights", "chosen_lengths", "rejected_lengths"])
    def test_shapes(self, name: str) -> None:
        x, n = torch.zeros(2), torch.ones(2, dtype=torch.long)
        options = {"margin": x, "weights": x, "chosen_lengths": n, "rejected_lengths": n, "length_normalize": True}
        dpo_loss(x, x, x, x, **options)
        with pytest.raises(ValueError, match=rf"{name} must .*2.*3"):
            dpo_loss(x, x, x, x, **{**options, name: torch.ones(3, dtype=options[name].dtype)})


class TestCompile:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    @pytest.mark.parametrize(
        "options",
        [
            {"f_divergence": "js", "margin": torch.ones(5).double(), "label_smoothing": 0.1},
            {"loss_type": "ipo", "length_normalize": True},
            {"loss_type": "aot"},
            {"loss_type": "discopop", "weights": torch.ones(5).double()},
            {"loss_type": ["orpo", "sft"], "loss_weights": [0.5, 1.0]},
        ],
        ids=["sigmoid", "ipo", "aot", "discopop", "list"],
    )
    def test_traces_whole(self, options: dict[str, Any]) -> None:
        torch.compiler.reset()
        columns, lengths = example(5)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        compiled = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")
        answers = []
        for function in (dpo_loss, compiled):
            leaves = [c.clone().requires_grad_() for c in columns[:2]]
            result = function(*leaves, *columns[2:], **n, **options)
            answers.append([*result, *torch.autograd.grad(result.loss, leaves)])
        torch.testing.assert_close(*answers, rtol=1e-13, atol=1e-14)


any_of = settings(
    max_examples=400, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@any_of
@given(data=st.data())
def test_anything(data: Any) -> None:
    """Any type, batch, scale, lengths and options that it has."""
    draw = data.draw
    kind = draw(st.sampled_from(TYPES))
    size = draw(st.integers(0, 6))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    columns, lengths = example(size, draw(st.integers(0, 2**16)), dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        gone = torch.rand(size, generator=generator) < 0.3
        lengths[0][gone] = 0
    options: dict[str, Any] = {"beta": draw(st.sampled_from([0.01, 0.1, 1.0, 2.5])), **required(kind)}
    if kind in SMOOTHED and draw(st.booleans()):
        options["label_smoothing"] = draw(st.floats(0.01, 0.45))
    if kind in MARGIN and draw(st.booleans()):
        options["margin"] = torch.randn(size, generator=generator)
    if kind not in (*SORTED, "sft") and draw(st.booleans()):
        options["weights"] = torch.rand(size, generator=generator)
    if kind in DIVERGENCE and draw(st.booleans()):
        options["f_divergence"] = draw(st.sampled_from(["forward_kl", "js", "alpha"]))
        if options["f_divergence"] == "alpha":
            options["f_alpha"] = draw(st.sampled_from([-1.0, 0.5, 0.999, 1.0, 1.5]))
    if kind in DIVISIBLE and draw(st.booleans()):
        options["length_normalize"] = True
    if kind not in FREE and draw(st.booleans()):
        options["reference_free"] = True
        options.pop("f_divergence", None)  # of sums of log-probs themselves, which are far from 0
        options.pop("f_alpha", None)
    if kind != "sft" and draw(st.booleans()):
        options["sft_weight"] = draw(st.sampled_from([0.1, 2.0]))
        options["sft_reduction"] = draw(st.sampled_from(["token", "sequence"]))
    likelihood = kind == "sft" or "sft_weight" in options
    reduction = draw(st.sampled_from(["mean", "sum"] if likelihood else ["mean", "sum", "none"]))
    if reduction == "sum":
        reduction = "mean"
        check(kind, columns, lengths, "mean", gradient=False, **options)
    check(kind, columns, lengths, reduction, gradient=kind not in SORTED, **options)


def kto_definition(
    policy: Numbers, ref: Numbers, good: list[bool], z: Any, beta: Any, desirable: float, undesirable: float
) -> Numbers:
    z = max(mp.mpf(0), z)
    losses = []
    for p, r, g in zip(policy, ref, good, strict=True):
        x = mp.mpf(beta) * (p - r - z)
        losses.append(desirable * sigmoid(-x) if g else undesirable * sigmoid(x))
    return losses


class TestKto:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("kl", [0.0, 1.25, -3.0, torch.tensor(0.5), torch.tensor([1.0, -0.5, 2.0])])
    @pytest.mark.parametrize("options", [{}, {"beta": 0.5, "desirable_weight": 1.33, "undesirable_weight": 0.25}])
    def test_formula(self, kl: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
        (policy, _, ref, _), _ = example(6, dtype=dtype)
        good = torch.tensor([True, False, True, True, False, False])
        leaf, eps = policy.clone().requires_grad_(), torch.finfo(dtype).eps
        kl = kl.to(dtype) if isinstance(kl, Tensor) else kl
        result = kto_loss(leaf, ref, good, kl=kl, reduction="none", **options)
        z = mp.mpf(kl.mean().item() if isinstance(kl, Tensor) else kl)
        weights = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, **options}

        def right(p: Numbers) -> Numbers:
            return kto_definition(p, numbers(ref), good.tolist(), z, *weights.values())

        exact, beta = numbers(policy), weights["beta"]
        for got, wanted in zip(result.loss.tolist(), right(exact), strict=True):
            assert abs(got - wanted) <= 8 * eps * (1 + beta * 60)
        (slope,) = torch.autograd.grad(result.loss.sum(), leaf)
        for got, wanted in zip(slope.tolist(), derivative(lambda p: sum(right(p)), exact), strict=True):
            assert abs(got - wanted) <= 8 * eps * beta * (1 + beta * 60)
        torch.testing.assert_close(result.rewards, beta * (policy - ref))
        assert not result.rewards.requires_grad
        mean = kto_loss(policy, ref, good, kl=kl, **options).loss
        torch.testing.assert_close(mean, result.loss.detach().sum() / 6)
        torch.testing.assert_close(kto_loss(policy, ref, good, kl=kl, reduction="sum", **options).loss, mean * 6)

    def test_by_hand(self) -> None:
        policy = torch.tensor([LOG3, LOG3, 0.0, 0.0], dtype=torch.float64)
        good = torch.tensor([True, False, True, False])
        zero = torch.zeros(4, dtype=torch.float64)
        got = kto_loss(policy, zero, good, kl=0.0, beta=1.0, undesirable_weight=2.0, reduction="none")
        assert got.loss.tolist() == pytest.approx([0.25, 1.5, 0.5, 1.0])
        assert got.rewards.tolist() == pytest.approx([LOG3, LOG3, 0, 0])
        got = kto_loss(policy, zero, good, kl=LOG3, beta=1.0, reduction="none")
        assert got.loss.tolist() == pytest.approx([0.5, 0.5, 0.75, 0.25])

    def test_the_baseline_is_one_number_without_a_gradient(self) -> None:
        (policy, _, ref, _), _ = example(4)
        good = torch.tensor([True, False, True, False])
        kl = torch.tensor([3.0, -1.0, 1.0], dtype=torch.float64).requires_grad_()
        leaf = policy.clone().requires_grad_()
        loss = kto_loss(leaf, ref, good, kl=kl).loss
        assert torch.equal(loss.detach(), kto_loss(policy, ref, good, kl=1.0).loss)
        loss.backward()
        assert kl.grad is None
        assert leaf.grad is not None
        assert (leaf.grad != 0).all()

    def test_the_baseline_is_not_below_zero(self) -> None:
        (policy, _, ref, _), _ = example(4)
        good = torch.tensor([True, False, True, False])
        at_zero = kto_loss(policy, ref, good, kl=0.0).loss
        for kl in (-5.0, torch.tensor([-5.0, 1.0]).double(), torch.zeros(0, dtype=torch.float64)):
            assert torch.equal(kto_loss(policy, ref, good, kl=kl).loss, at_zero)
        # The mean is taken first: the parts below zero count.
        mixed = torch.tensor([-1.0, 3.0], dtype=torch.float64)
        assert torch.equal(kto_loss(policy, ref, good, kl=mixed).loss, kto_loss(policy, ref, good, kl=1.0).loss)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_empty(self, reduction: str) -> None:
        leaf = torch.zeros(0).requires_grad_()
        result = kto_loss(leaf, torch.zeros(0), torch.zeros(0, dtype=torch.bool), kl=0.5, reduction=reduction)
        assert result.loss.shape == ((0,) if reduction == "none" else ())
        assert result.loss.sum().item() == 0
        assert result.rewards.shape == (0,)
        assert torch.autograd.grad(result.loss.sum(), leaf)[0].shape == (0,)

    @pytest.mark.parametrize("good", [True, False])
    def test_one_kind_alone(self, good: bool) -> None:
        (policy, _, ref, _), _ = example(3)
        loss = kto_loss(policy, ref, torch.full((3,), good), kl=0.25, beta=1.0).loss
        x = (policy - ref - 0.25) * (-1 if good else 1)
        torch.testing.assert_close(loss, x.sigmoid().mean())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        (policy, _, ref, _), _ = example(5, dtype=dtype)
        good = torch.tensor([True, False, True, False, True])
        got = kto_loss(policy, ref, good, kl=0.5)
        wide = kto_loss(policy.float(), ref.float(), good, kl=0.5)
        assert got.loss.dtype == got.rewards.dtype == torch.float32
        assert torch.equal(got.loss, wide.loss)
        assert torch.equal(got.rewards, wide.rewards)

    @pytest.mark.parametrize("u", [1e2, 1e3, 1e4])
    def test_extremes(self, u: float) -> None:
        leaf = torch.tensor([u, -u, u, -u]).requires_grad_()
        good = torch.tensor([True, True, False, False])
        loss = kto_loss(leaf, torch.zeros(4), good, kl=0.0, beta=1.0, reduction="none").loss
        assert loss.tolist() == pytest.approx([0, 1, 1, 0], abs=1e-6)
        assert torch.autograd.grad(loss.sum(), leaf)[0].tolist() == pytest.approx([0] * 4, abs=1e-6)

    def test_gradcheck(self) -> None:
        (policy, _, ref, _), _ = example(5)
        good = torch.tensor([True, False, True, False, True])
        leaves = [policy.requires_grad_(), ref.requires_grad_()]
        for reduction in ("mean", "none"):
            options = {"kl": 0.3, "beta": 0.4, "desirable_weight": 2.0, "reduction": reduction}
            assert torch.autograd.gradcheck(lambda p, r, o=options: kto_loss(p, r, good, **o).loss, leaves)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_traces_whole(self) -> None:
        torch.compiler.reset()
        (policy, _, ref, _), _ = example(5)
        good, kl = torch.tensor([True, False, True, False, True]), torch.tensor([0.5, 1.0], dtype=torch.float64)
        compiled = torch.compile(kto_loss, fullgraph=True, backend="aot_eager")
        wanted, got = kto_loss(policy, ref, good, kl=kl), compiled(policy, ref, good, kl=kl)
        torch.testing.assert_close(tuple(got), tuple(wanted), rtol=1e-13, atol=1e-14)

    def test_refusals(self) -> None:
        x, good = torch.zeros(2), torch.tensor([True, False])
        with pytest.raises(TypeError, match=r"desirable must .*bool.*int64"):
            kto_loss(x, x, good.long(), kl=0.0)
        with pytest.raises(ValueError, match=r"desirable must .*2.*3"):
            kto_loss(x, x, torch.ones(3, dtype=torch.bool), kl=0.0)
        with pytest.raises(ValueError, match=r"ref_logps must .*2.*3"):
            kto_loss(x, torch.zeros(3), good, kl=0.0)
        with pytest.raises(ValueError, match=r"beta must .*-1"):
            kto_loss(x, x, good, kl=0.0, beta=-1.0)
        with pytest.raises(ValueError, match=r"reduction must .*'batchmean'"):
            kto_loss(x, x, good, kl=0.0, reduction="batchmean")

"""The formulas of preference losses, each with its derivative.

They restate those of `fastpref.reference.losses.loss_types`. Which of them is chosen when a kernel is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastpref_kernels.triton.common import exp, log1p
from fastpref_kernels.triton.losses.common import log_sigmoid, sigmoid


class Pairs(NamedTuple):
    """Log-probs and numbers of tokens of pairs of answers, each (N,); None for what a loss does without."""

    chosen: Any
    rejected: Any
    ref_chosen: Any
    ref_rejected: Any
    chosen_lengths: Any
    rejected_lengths: Any


@triton.jit
def _expm1(x, ACC: tl.constexpr):
    """Return exp(x) - 1. The logarithm of the rounded exponential puts back what it rounded away near 1."""
    e = exp(x, ACC)
    return tl.where(e == 1.0, x, tl.where(e - 1.0 == -1.0, -1.0, (e - 1.0) * x / tl.log(e)))


@triton.jit
def _log1mexp(x, ACC: tl.constexpr):
    """Return log(1 - exp(x)) for x < 0."""
    near = x > -0.6931471805599453
    return tl.where(near, tl.log(-_expm1(tl.where(near, x, -1.0), ACC)), log1p(-exp(tl.where(near, -1.0, x), ACC)))


@triton.jit
def _under_divergence(ratio, rate, largest, F_DIVERGENCE: tl.constexpr, ACC: tl.constexpr):
    """Return what replaces a log-ratio under an f-divergence, its derivative, and its exponent."""
    if F_DIVERGENCE == "reverse_kl":
        return ratio, tl.zeros_like(ratio) + 1.0, ratio
    elif F_DIVERGENCE == "js":
        return 0.6931471805599453 + log_sigmoid(ratio, ACC), sigmoid(-ratio, ACC), ratio
    else:
        t = rate * ratio
        held = tl.where(t > largest, largest, t)
        return _expm1(held, ACC) / rate, tl.where(t > largest, 0.0, exp(held, ACC)), t


@triton.jit
def smoothed(u, smoothing, ACC: tl.constexpr):
    """Return -(1-ε)ℓ(u) - εℓ(-u) and its derivative, where ℓ is log σ."""
    # Left out at ε = 0, as in the formula's code: log σ(-u) may be -inf.
    flipped = tl.where(smoothing == 0.0, 0.0, smoothing * log_sigmoid(-u, ACC))
    losses = -(1.0 - smoothing) * log_sigmoid(u, ACC) - flipped
    return losses, smoothing * sigmoid(u, ACC) - (1.0 - smoothing) * sigmoid(-u, ACC)


@triton.jit
def pair_losses(
    x, y, h, margin, beta, smoothing, delta, gamma, tau, spread, LOSS_TYPE: tl.constexpr, ACC: tl.constexpr
):
    """Return losses of a type, and their partial derivatives by x and y.

    Args:
        x: the policy's minus the reference's log-prob of the chosen answer, Δw.
        y: the same of the rejected answer, Δl.
        h: x - y.
        margin, beta, delta, gamma, tau: options of the loss.
        smoothing: ε, the label smoothing.
        spread: 1/(1 - 2ε).
        LOSS_TYPE: the type.
    """
    u = beta * h - margin
    half_width = 1.0 / (2.0 * beta)
    if LOSS_TYPE == "sigmoid" or LOSS_TYPE == "sigmoid_norm" or LOSS_TYPE == "cpo" or LOSS_TYPE == "simpo":
        if LOSS_TYPE == "simpo":
            u -= gamma
        losses, by_u = smoothed(u, smoothing, ACC)
        return losses, beta * by_u, -beta * by_u
    elif LOSS_TYPE == "robust":
        flipped = tl.where(smoothing == 0.0, 0.0, smoothing * log_sigmoid(-u, ACC))
        losses = (flipped - (1.0 - smoothing) * log_sigmoid(u, ACC)) * spread
        by_u = -((1.0 - smoothing) * sigmoid(-u, ACC) + smoothing * sigmoid(u, ACC)) * spread
        return losses, beta * by_u, -beta * by_u
    elif LOSS_TYPE == "hinge":
        by_x = tl.where(u >= 1.0, 0.0, -beta)
        return tl.where(u >= 1.0, 0.0, 1.0 - u), by_x, -by_x
    elif LOSS_TYPE == "ipo":
        off = h - half_width
        return off * off, 2.0 * off, -2.0 * off
    elif LOSS_TYPE == "exo_pair":
        won = tl.log(1.0 - smoothing)
        lost = tl.log(smoothing)
        losses = sigmoid(u, ACC) * (log_sigmoid(u, ACC) - won) + sigmoid(-u, ACC) * (log_sigmoid(-u, ACC) - lost)
        by_x = beta * sigmoid(u, ACC) * sigmoid(-u, ACC) * (u - won + lost)
        return losses, by_x, -by_x
    elif LOSS_TYPE == "nca_pair":
        p, q = beta * x, beta * y
        losses = -log_sigmoid(p, ACC) - 0.5 * log_sigmoid(-p, ACC) - 0.5 * log_sigmoid(-q, ACC)
        return losses, beta * (0.5 * sigmoid(p, ACC) - sigmoid(-p, ACC)), 0.5 * beta * sigmoid(q, ACC)
    elif LOSS_TYPE == "bco_pair":
        p, q = beta * x - delta, beta * y - delta
        return -log_sigmoid(p, ACC) - log_sigmoid(-q, ACC), -beta * sigmoid(-p, ACC), beta * sigmoid(q, ACC)
    elif LOSS_TYPE == "sppo_hard":
        p, q = x - half_width, y + half_width
        return p * p + q * q, 2.0 * p, 2.0 * q
    elif LOSS_TYPE == "apo_zero":
        p, q = beta * x, beta * y
        by_x = -beta * sigmoid(p, ACC) * sigmoid(-p, ACC)
        return sigmoid(-p, ACC) + sigmoid(q, ACC), by_x, beta * sigmoid(q, ACC) * sigmoid(-q, ACC)
    elif LOSS_TYPE == "apo_down":
        p = beta * x
        by_y = beta * sigmoid(u, ACC) * sigmoid(-u, ACC)
        return sigmoid(p, ACC) + sigmoid(-u, ACC), beta * sigmoid(p, ACC) * sigmoid(-p, ACC) - by_y, by_y
    elif LOSS_TYPE == "discopop":
        log_m = log_sigmoid(u / tau, ACC)
        rest = sigmoid(-u / tau, ACC)
        blend = exp(log_m - u, ACC)  # m·exp(-u) as one: apart, one is 0 where the other is infinite
        logistic = log_sigmoid(u, ACC)
        by_u = rest * (sigmoid(u / tau, ACC) * logistic / tau - sigmoid(-u, ACC)) + blend * (rest / tau - 1.0)
        return blend - rest * logistic, beta * by_u, -beta * by_u
    elif LOSS_TYPE == "orpo":
        # At p = 1 the odds are those of the largest p whose complement the dtype can hold.
        if tl.float64 == ACC:
            nearest = tl.full((), -2.3e-308, ACC)
        else:
            nearest = tl.full((), -1.2e-38, ACC)
        x = tl.where(x > nearest, nearest, x)
        y = tl.where(y > nearest, nearest, y)
        rest_x, rest_y = _log1mexp(x, ACC), _log1mexp(y, ACC)
        gap = x - rest_x - (y - rest_y)
        behind = log_sigmoid(-gap, ACC)
        # σ(-gap)/(1 - p) as one exponential, which is finite where 1/(1 - p) is not.
        return -beta * log_sigmoid(gap, ACC), -beta * exp(behind - rest_x, ACC), beta * exp(behind - rest_y, ACC)
    else:
        tl.static_assert(LOSS_TYPE == "sft")
        return tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)


@triton.jit
def pair_terms(
    pairs,
    i,
    inside,
    rate,
    largest,
    PAIRED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    F_DIVERGENCE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return what a loss compares, x and y, their difference, and their slopes by the chosen and rejected log-probs.

    These are Δw and Δl; with `PAIRED`, w - l of the policy and of the reference. The divergence maps a log-ratio, and
    `rate` and `largest` are its exponent's factor and the largest exponent that the dtype holds the power of.
    """
    w = tl.load(pairs.chosen + i, mask=inside, other=0.0).to(ACC)
    l = tl.load(pairs.rejected + i, mask=inside, other=0.0).to(ACC)  # noqa: E741 - the papers' letter
    rw, rl = tl.zeros_like(w), tl.zeros_like(l)
    if pairs.ref_chosen is not None:
        rw = tl.load(pairs.ref_chosen + i, mask=inside, other=0.0).to(ACC)
        rl = tl.load(pairs.ref_rejected + i, mask=inside, other=0.0).to(ACC)
    per_w, per_l = tl.zeros_like(w) + 1.0, tl.zeros_like(l) + 1.0
    if NORMALIZE:
        per_w = 1.0 / tl.maximum(tl.load(pairs.chosen_lengths + i, mask=inside, other=1).to(ACC), 1.0)
        per_l = 1.0 / tl.maximum(tl.load(pairs.rejected_lengths + i, mask=inside, other=1).to(ACC), 1.0)
    if PAIRED:
        x, y = w * per_w - l * per_l, rw * per_w - rl * per_l
        return x, y, x - y, per_w, per_l
    else:
        x, slope_x, a = _under_divergence(w - rw, rate, largest, F_DIVERGENCE, ACC)
        y, slope_y, b = _under_divergence(l - rl, rate, largest, F_DIVERGENCE, ACC)
        x *= per_w
        y *= per_l
        h = x - y
        if F_DIVERGENCE == "forward_kl" or F_DIVERGENCE == "alpha":
            # Where both are held at the largest number, which of them is larger is in their exponents.
            ahead = a - b + tl.log(per_w / per_l)
            gap = -_expm1(-tl.abs(ahead), ACC) * exp(largest, ACC) / rate
            h = tl.where((a > largest) & (b > largest), tl.where(ahead < 0, -gap, gap), h)
        return x, y, h, slope_x * per_w, slope_y * per_l

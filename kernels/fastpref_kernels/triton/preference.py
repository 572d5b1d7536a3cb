"""Preference losses of log-probs: one launch gives the loss, the implicit rewards and the partial derivatives.

`_pair_losses` restates the formulas of `fastpref.reference.losses.loss_types` with their derivatives; which one is
chosen when the kernel is compiled.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import accumulator, dense, exp, join, log1p, split
from fastpref_kernels.triton.launch import launch
from fastpref_kernels.triton.loss import finish, launch_loss, log_sigmoid, outputs, sigmoid

# Halves of one tensor, as often as not: the second begins where the number of pairs puts it.
PAIRS = ["chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths"]


@triton.jit
def _expm1(x, ACC: tl.constexpr):
    """exp(x) - 1: what exp rounds away near 1 is put back by the logarithm of what it gave."""
    e = exp(x, ACC)
    return tl.where(e == 1.0, x, tl.where(e - 1.0 == -1.0, -1.0, (e - 1.0) * x / tl.log(e)))


@triton.jit
def _log1mexp(x, ACC: tl.constexpr):
    """log(1 - exp(x)) for x < 0."""
    near = x > -0.6931471805599453
    return tl.where(near, tl.log(-_expm1(tl.where(near, x, -1.0), ACC)), log1p(-exp(tl.where(near, -1.0, x), ACC)))


@triton.jit
def _under_divergence(ratio, rate, largest, F_DIVERGENCE: tl.constexpr, ACC: tl.constexpr):
    """What stands in a log-ratio's place under an f-divergence, its derivative, and its exponent."""
    if F_DIVERGENCE == "reverse_kl":
        return ratio, tl.zeros_like(ratio) + 1.0, ratio
    elif F_DIVERGENCE == "js":
        return 0.6931471805599453 + log_sigmoid(ratio, ACC), sigmoid(-ratio, ACC), ratio
    else:
        t = rate * ratio
        held = tl.where(t > largest, largest, t)
        return _expm1(held, ACC) / rate, tl.where(t > largest, 0.0, exp(held, ACC)), t


@triton.jit
def _smoothed(u, smoothing, ACC: tl.constexpr):
    """-(1-ε)ℓ(u) - εℓ(-u), and its derivative."""
    # Left out at ε = 0, as in the formula's code: log σ(-u) may be -inf.
    flipped = tl.where(smoothing == 0.0, 0.0, smoothing * log_sigmoid(-u, ACC))
    losses = -(1.0 - smoothing) * log_sigmoid(u, ACC) - flipped
    return losses, smoothing * sigmoid(u, ACC) - (1.0 - smoothing) * sigmoid(-u, ACC)


@triton.jit
def _pair_losses(
    x, y, h, margin, beta, smoothing, delta, gamma, tau, spread, LOSS_TYPE: tl.constexpr, ACC: tl.constexpr
):
    """A loss type's value and partial derivatives by x, Δw of the formulas, and y, their Δl; h is x - y."""
    u = beta * h - margin
    half_width = 1.0 / (2.0 * beta)
    if (
        LOSS_TYPE == "sigmoid" or LOSS_TYPE == "sigmoid_norm" or LOSS_TYPE == "cpo"
        or LOSS_TYPE == "simpo" or LOSS_TYPE == "robust"
    ):  # fmt: skip
        if LOSS_TYPE == "simpo":
            u -= gamma
        if LOSS_TYPE == "robust":
            # `spread` is 1/(1 - 2ε).
            flipped = tl.where(smoothing == 0.0, 0.0, smoothing * log_sigmoid(-u, ACC))
            losses = (flipped - (1.0 - smoothing) * log_sigmoid(u, ACC)) * spread
            by_u = -((1.0 - smoothing) * sigmoid(-u, ACC) + smoothing * sigmoid(u, ACC)) * spread
        else:
            losses, by_u = _smoothed(u, smoothing, ACC)
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
def _pair_terms(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, i, inside, rate, largest,
    PAIRED: tl.constexpr, NORMALIZE: tl.constexpr, F_DIVERGENCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a loss compares: Δw and Δl, or `PAIRED` w - l and rw - rl; their difference; slopes by the chosen and the
    rejected log-probs."""
    w = tl.load(chosen + i, mask=inside, other=0.0).to(ACC)
    l = tl.load(rejected + i, mask=inside, other=0.0).to(ACC)  # noqa: E741 - the papers' letter
    rw, rl = tl.zeros_like(w), tl.zeros_like(l)
    if ref_chosen is not None:
        rw = tl.load(ref_chosen + i, mask=inside, other=0.0).to(ACC)
        rl = tl.load(ref_rejected + i, mask=inside, other=0.0).to(ACC)
    per_w, per_l = tl.zeros_like(w) + 1.0, tl.zeros_like(l) + 1.0
    if NORMALIZE:
        per_w = 1.0 / tl.maximum(tl.load(chosen_lengths + i, mask=inside, other=1).to(ACC), 1.0)
        per_l = 1.0 / tl.maximum(tl.load(rejected_lengths + i, mask=inside, other=1).to(ACC), 1.0)
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


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=PAIRS)
def order_kernel(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths,  # (N,)
    ordered, places, ticket,  # (2, N), (2, N) int32, (1,) int32
    N, rate_high, rate_low, largest_high, largest_low,
    PAIRED: tl.constexpr, NORMALIZE: tl.constexpr, F_DIVERGENCE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort what `aot` compares: every element counts those before it, in N² comparisons and no second launch.

    It also sets the counter at which the programs of the loss will meet.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(ticket, 0)
    rate = join(rate_high, rate_low, ACC)
    largest = join(largest_high, largest_low, ACC)
    x, y, _h, _slope_x, _slope_y = _pair_terms(
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, i, i < N, rate, largest,
        PAIRED, NORMALIZE, F_DIVERGENCE, ACC,
    )  # fmt: skip
    # NaN would be before and after nothing, and its place another's.
    key_x = tl.where(x != x, float("inf"), x)
    key_y = tl.where(y != y, float("inf"), y)
    place_x = tl.zeros((BLOCK,), tl.int32)
    place_y = tl.zeros((BLOCK,), tl.int32)
    for j in range(0, N):
        # Names of their own: what a loop assigns must have one type throughout.
        other_x, other_y, _other_h, _other_slope_x, _other_slope_y = _pair_terms(
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, j, j < N, rate, largest,
            PAIRED, NORMALIZE, F_DIVERGENCE, ACC,
        )  # fmt: skip
        other_x = tl.where(other_x != other_x, float("inf"), other_x)
        other_y = tl.where(other_y != other_y, float("inf"), other_y)
        place_x += ((other_x < key_x) | ((other_x == key_x) & (j < i))).to(tl.int32)
        place_y += ((other_y < key_y) | ((other_y == key_y) & (j < i))).to(tl.int32)
    tl.store(places + i, place_x, mask=i < N)
    tl.store(places + N + i, place_y, mask=i < N)
    tl.store(ordered + place_x, x, mask=i < N)
    tl.store(ordered + N + place_y, y, mask=i < N)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=[*PAIRS, "margins", "weights"])
def dpo_kernel(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, margins, weights,  # (N,)
    ordered, places,  # (2, N), (2, N), what `order_kernel` made, or None
    loss, partials, chosen_rewards, rejected_rewards, scratch, ticket,  # () or (N,), (2 or 4, N), (N,), (N,)
    N, beta_high, beta_low, smoothing_high, smoothing_low, margin_high, margin_low, rate_high, rate_low,
    largest_high, largest_low, delta_high, delta_low, gamma_high, gamma_low, tau_high, tau_low, spread_high, spread_low,
    scale_high, scale_low,
    sft_high, sft_low,
    LOSS_TYPE: tl.constexpr, PAIRED: tl.constexpr, NORMALIZE: tl.constexpr, F_DIVERGENCE: tl.constexpr,
    SFT: tl.constexpr, SUMMED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, implicit rewards and partial derivatives of pairs; `SFT` is how the likelihood term is divided, or None."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    beta = join(beta_high, beta_low, ACC)
    smoothing = join(smoothing_high, smoothing_low, ACC)
    scale = join(scale_high, scale_low, ACC)
    x, y, h, slope_x, slope_y = _pair_terms(
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, i, inside,
        join(rate_high, rate_low, ACC), join(largest_high, largest_low, ACC), PAIRED, NORMALIZE, F_DIVERGENCE, ACC,
    )  # fmt: skip
    if ordered is not None:
        # x meets the y of its own rank, and y the x of its own: another pair's loss.
        place_x = tl.load(places + i, mask=inside, other=0)
        place_y = tl.load(places + N + i, mask=inside, other=0)
        losses, by_u = _smoothed(beta * (x - tl.load(ordered + N + place_x, mask=inside, other=0.0)), smoothing, ACC)
        _, by_u_of_y = _smoothed(beta * (tl.load(ordered + place_y, mask=inside, other=0.0) - y), smoothing, ACC)
        by_x, by_y = beta * by_u, -beta * by_u_of_y
    else:
        margin = join(margin_high, margin_low, ACC)
        if margins is not None:
            margin += tl.load(margins + i, mask=inside, other=0.0).to(ACC)
        losses, by_x, by_y = _pair_losses(
            x, y, h, margin, beta, smoothing, join(delta_high, delta_low, ACC), join(gamma_high, gamma_low, ACC),
            join(tau_high, tau_low, ACC), join(spread_high, spread_low, ACC), LOSS_TYPE, ACC,
        )  # fmt: skip
        if weights is not None:
            weight = tl.load(weights + i, mask=inside, other=0.0).to(ACC)
            losses, by_x, by_y = losses * weight, by_x * weight, by_y * weight
    losses *= scale
    by_x *= scale
    by_y *= scale
    if PAIRED:
        by_w, by_l, by_rw, by_rl = by_x * slope_x, -by_x * slope_y, by_y * slope_x, -by_y * slope_y
    else:
        by_w, by_l = by_x * slope_x, by_y * slope_y
        by_rw, by_rl = -by_w, -by_l
    if SFT is not None:
        sft = join(sft_high, sft_low, ACC)
        logp = tl.load(chosen + i, mask=inside, other=0.0).to(ACC)
        if SFT == "token":
            tokens = tl.zeros((BLOCK,), ACC)
            for start in range(0, N, BLOCK):
                j = start + tl.arange(0, BLOCK)
                tokens += tl.load(chosen_lengths + j, mask=j < N, other=0).to(ACC)
            sft *= N / tl.maximum(tl.sum(tokens), 1.0)
        else:
            sft /= tl.maximum(tl.load(chosen_lengths + i, mask=inside, other=1).to(ACC), 1.0)
        losses -= sft * logp
        by_w -= sft

    w = tl.load(chosen + i, mask=inside, other=0.0).to(ACC)
    l = tl.load(rejected + i, mask=inside, other=0.0).to(ACC)  # noqa: E741
    if MEAN:
        by_w, by_l, by_rw, by_rl = by_w / N, by_l / N, by_rw / N, by_rl / N
    if ref_chosen is not None:
        w -= tl.load(ref_chosen + i, mask=inside, other=0.0).to(ACC)
        l -= tl.load(ref_rejected + i, mask=inside, other=0.0).to(ACC)  # noqa: E741
        tl.store(partials + 2 * N + i, by_rw, mask=inside)
        tl.store(partials + 3 * N + i, by_rl, mask=inside)
    tl.store(partials + i, by_w, mask=inside)
    tl.store(partials + N + i, by_l, mask=inside)
    tl.store(chosen_rewards + i, beta * w, mask=inside)
    tl.store(rejected_rewards + i, beta * l, mask=inside)
    total = tl.sum(tl.where(inside, losses, 0.0))
    finish(losses, total, scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


@triton.jit(do_not_specialize=["N", "K"], do_not_specialize_on_alignment=["logps", "ref_logps", "desirable", "kl"])
def kto_kernel(
    logps, ref_logps, desirable, kl,  # (N,), (N,), (N,) bool, (K,)
    loss, partials, rewards, scratch, ticket,  # () or (N,), (2, N), (N,)
    N, K, kl_high, kl_low, beta_high, beta_low, desirable_high, desirable_low, undesirable_high, undesirable_low,
    SUMMED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, implicit rewards and partial derivatives of unpaired answers; `kl` may be one number, a scalar."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    beta = join(beta_high, beta_low, ACC)
    z = join(kl_high, kl_low, ACC)
    if kl is not None:
        acc = tl.zeros((BLOCK,), ACC)
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            acc += tl.load(kl + k, mask=k < K, other=0.0).to(ACC)
        z = tl.sum(acc) / tl.maximum(K, 1)
    z = tl.where(z < 0.0, 0.0, z)
    ratio = tl.load(logps + i, mask=inside, other=0.0).to(ACC) - tl.load(ref_logps + i, mask=inside, other=0.0).to(ACC)
    good = tl.load(desirable + i, mask=inside, other=0) != 0
    weight = tl.where(
        good, join(desirable_high, desirable_low, ACC), join(undesirable_high, undesirable_low, ACC)
    )  # fmt: skip
    towards = tl.where(good, -beta, beta)
    v = towards * (ratio - z)
    losses = weight * sigmoid(v, ACC)
    by_logp = weight * towards * sigmoid(v, ACC) * sigmoid(-v, ACC)
    if MEAN:
        by_logp = by_logp / N
    tl.store(partials + i, by_logp, mask=inside)
    tl.store(partials + N + i, -by_logp, mask=inside)
    tl.store(rewards + i, beta * ratio, mask=inside)
    finish(losses, tl.sum(tl.where(inside, losses, 0.0)), scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


@functools.lru_cache(maxsize=256)
def _dpo_scalars(
    dtype: torch.dtype, loss_type: str, loss_weight: float, beta: float, label_smoothing: float,
    constant_margin: float, f_divergence: str, f_alpha: float, delta: float, gamma: float, discopop_tau: float,
    sft_weight: float,
) -> tuple[str, tuple[float, ...], tuple[float, ...]]:  # fmt: skip
    """Return the divergence to compile for, and the numbers that `order_kernel` and `dpo_kernel` take."""
    # α - 1, and 1 - 2ε, are made here: in float32 a small difference would lose its digits.
    rate = -1.0 if f_divergence == "forward_kl" else f_alpha - 1
    kind = "reverse_kl" if f_divergence == "alpha" and rate == 0 else f_divergence
    # The largest exponent whose power over the rate the dtype holds; a hair below, as in the formula's code.
    largest = math.log(torch.finfo(dtype).max) + min(math.log(abs(rate) or 1.0), 0.0) - 1e-3
    spread = 1 / (1 - 2 * label_smoothing) if loss_type == "robust" else 1.0
    numbers = split(
        beta, label_smoothing, constant_margin, rate, largest, delta, gamma, discopop_tau, spread,
        loss_weight, sft_weight,
    )  # fmt: skip
    return kind, split(rate, largest), numbers


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None, rejected_lengths: Tensor | None, margin: Tensor | None, weights: Tensor | None,
    loss_type: str, loss_weight: float, beta: float, label_smoothing: float, constant_margin: float,
    length_normalize: bool, f_divergence: str, f_alpha: float, delta: float, gamma: float, discopop_tau: float,
    sft_weight: float, sft_reduction: str, reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::dpo_loss`."""
    pairs, order = launches.SMALL["dpo"], launches.SMALL["order"]
    loss, partials = outputs(reduction, chosen, rejected, ref_chosen, ref_rejected)
    N, dtype = chosen.shape[0], loss.dtype
    chosen_rewards, rejected_rewards = loss.new_empty(N), loss.new_empty(N)
    kind, order_scalars, scalars = _dpo_scalars(
        dtype, loss_type, loss_weight, beta, label_smoothing, constant_margin, f_divergence, f_alpha, delta, gamma,
        discopop_tau, sft_weight,
    )  # fmt: skip
    *tensors, margin, weights = dense(
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, margin, weights
    )
    shape = {"PAIRED": loss_type == "aot", "NORMALIZE": length_normalize, "F_DIVERGENCE": kind}
    ordered = places = ticket = None
    if loss_type in ("aot", "aot_unpaired") and N:
        ordered, places = chosen.new_empty((2, N), dtype=dtype), chosen.new_empty((2, N), dtype=torch.int32)
        ticket = chosen.new_empty(1, dtype=torch.int32)
        launch(
            order_kernel, (N + order.block - 1) // order.block, *tensors, ordered, places, ticket, N, *order_scalars,
            **shape, ACC=accumulator(dtype), BLOCK=order.block, num_warps=order.warps,
            enable_fp_fusion=False,  # an element must be alike wherever it is made
        )  # fmt: skip
    launch_loss(
        dpo_kernel, N, pairs.block, loss, reduction,
        [*tensors, margin, weights, ordered, places, loss, partials, chosen_rewards, rejected_rewards],
        (N, *scalars), pairs.warps, ticket, LOSS_TYPE=loss_type, **shape, SFT=sft_reduction if sft_weight else None,
        BLOCK=pairs.block,
    )  # fmt: skip
    return loss, partials, chosen_rewards, rejected_rewards


def kto_loss(
    logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor | None, constant_kl: float, beta: float,
    desirable_weight: float, undesirable_weight: float, reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::kto_loss`."""
    N = logps.shape[0]
    block, warps, _ = launches.SMALL["kto"]
    loss, partials = outputs(reduction, logps, ref_logps)
    rewards = loss.new_empty(N)
    launch_loss(
        kto_kernel, N, block, loss, reduction,
        [*dense(logps, ref_logps, desirable, kl), loss, partials, rewards],
        (N, 0 if kl is None else kl.numel(), *split(constant_kl, beta, desirable_weight, undesirable_weight)), warps,
        BLOCK=block,
    )  # fmt: skip
    return loss, partials, rewards

"""Preference losses of log-probs: one launch gives the loss, the implicit rewards and the partial derivatives."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import accumulator, dense, join, split
from fastpref_kernels.triton.launch import launch
from fastpref_kernels.triton.losses.common import finish, launch_loss, outputs, sigmoid
from fastpref_kernels.triton.losses.loss_types import Pairs, pair_losses, pair_terms, smoothed

# Often halves of one tensor: the second half begins where the number of pairs puts it.
PAIRS = ["chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths"]


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=PAIRS)
def order_kernel(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths,  # (N,)
    ordered, places, ticket,  # (2, N), (2, N) int32, (1,) int32
    N, rate_high, rate_low, largest_high, largest_low,
    PAIRED: tl.constexpr, NORMALIZE: tl.constexpr, F_DIVERGENCE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort what `aot` compares: each element counts those before it, in N² comparisons without a second launch.

    It also clears the ticket of the loss's programs.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(ticket, 0)
    rate = join(rate_high, rate_low, ACC)
    largest = join(largest_high, largest_low, ACC)
    pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    x, y, _h, _slope_x, _slope_y = pair_terms(pairs, i, i < N, rate, largest, PAIRED, NORMALIZE, F_DIVERGENCE, ACC)
    # NaN would be before and after nothing, and its place another's.
    key_x = tl.where(x != x, float("inf"), x)
    key_y = tl.where(y != y, float("inf"), y)
    place_x = tl.zeros((BLOCK,), tl.int32)
    place_y = tl.zeros((BLOCK,), tl.int32)
    for j in range(0, N):
        # Names of their own: what a loop assigns must have one type throughout.
        other_x, other_y, _other_h, _other_slope_x, _other_slope_y = pair_terms(
            pairs, j, j < N, rate, largest, PAIRED, NORMALIZE, F_DIVERGENCE, ACC
        )
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
    """Compute loss, implicit rewards and partial derivatives of pairs.

    `SFT` is the likelihood term's reduction, or None without that term.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    beta = join(beta_high, beta_low, ACC)
    smoothing = join(smoothing_high, smoothing_low, ACC)
    scale = join(scale_high, scale_low, ACC)
    rate = join(rate_high, rate_low, ACC)
    largest = join(largest_high, largest_low, ACC)
    pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    x, y, h, slope_x, slope_y = pair_terms(pairs, i, inside, rate, largest, PAIRED, NORMALIZE, F_DIVERGENCE, ACC)
    if ordered is not None:
        # x meets the y of its own rank, and y the x of its own: another pair's loss.
        place_x = tl.load(places + i, mask=inside, other=0)
        place_y = tl.load(places + N + i, mask=inside, other=0)
        losses, by_u = smoothed(beta * (x - tl.load(ordered + N + place_x, mask=inside, other=0.0)), smoothing, ACC)
        _, by_u_of_y = smoothed(beta * (tl.load(ordered + place_y, mask=inside, other=0.0) - y), smoothing, ACC)
        by_x, by_y = beta * by_u, -beta * by_u_of_y
    else:
        margin = join(margin_high, margin_low, ACC)
        if margins is not None:
            margin += tl.load(margins + i, mask=inside, other=0.0).to(ACC)
        delta = join(delta_high, delta_low, ACC)
        gamma = join(gamma_high, gamma_low, ACC)
        tau = join(tau_high, tau_low, ACC)
        spread = join(spread_high, spread_low, ACC)
        losses, by_x, by_y = pair_losses(x, y, h, margin, beta, smoothing, delta, gamma, tau, spread, LOSS_TYPE, ACC)
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
    """Compute loss, implicit rewards and partial derivatives of unpaired answers.

    Without `kl`, the KL is the scalar.
    """
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
    weight = tl.where(good, join(desirable_high, desirable_low, ACC), join(undesirable_high, undesirable_low, ACC))
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
def _derived(
    dtype: torch.dtype, loss_type: str, label_smoothing: float, f_divergence: str, f_alpha: float
) -> tuple[str, float, float, float]:
    """Return what a loss's options come to in the kernels: the divergence to compile for, rate, largest and spread.

    These are made here because in float32 α - 1 and 1 - 2ε would lose their digits.
    """
    rate = -1.0 if f_divergence == "forward_kl" else f_alpha - 1
    kind = "reverse_kl" if f_divergence == "alpha" and rate == 0 else f_divergence
    # The largest exponent whose power over the rate the dtype holds, and a hair below it, as in the reference.
    largest = math.log(torch.finfo(dtype).max) + min(math.log(abs(rate) or 1.0), 0.0) - 1e-3
    spread = 1 / (1 - 2 * label_smoothing) if loss_type == "robust" else 1.0
    return kind, rate, largest, spread


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    margin: Tensor | None,
    weights: Tensor | None,
    loss_type: str,
    loss_weight: float,
    beta: float,
    label_smoothing: float,
    constant_margin: float,
    length_normalize: bool,
    f_divergence: str,
    f_alpha: float,
    delta: float,
    gamma: float,
    discopop_tau: float,
    sft_weight: float,
    sft_reduction: str,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Run `fastpref::dpo_loss`."""
    cut, order = launches.SMALL["dpo"], launches.SMALL["order"]
    loss, partials = outputs(reduction, chosen, rejected, ref_chosen, ref_rejected)
    N, dtype = chosen.shape[0], loss.dtype
    chosen_rewards, rejected_rewards = loss.new_empty(N), loss.new_empty(N)
    kind, rate, largest, spread = _derived(dtype, loss_type, label_smoothing, f_divergence, f_alpha)
    options = (beta, label_smoothing, constant_margin, rate, largest, delta, gamma, discopop_tau, spread)
    pairs = dense(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    shape = {"PAIRED": loss_type == "aot", "NORMALIZE": length_normalize, "F_DIVERGENCE": kind}
    ordered = places = ticket = None
    if loss_type in ("aot", "aot_unpaired") and N:
        ordered, places = chosen.new_empty((2, N), dtype=dtype), chosen.new_empty((2, N), dtype=torch.int32)
        ticket = chosen.new_empty(1, dtype=torch.int32)
        launch(
            order_kernel,
            (N + order.block - 1) // order.block,
            *(*pairs, ordered, places, ticket, N, *split(rate, largest)),
            **shape,
            ACC=accumulator(dtype),
            BLOCK=order.block,
            num_warps=order.warps,
            enable_fp_fusion=False,  # an element must be alike wherever it is made
        )
    results = (loss, partials, chosen_rewards, rejected_rewards)
    launch_loss(
        dpo_kernel,
        N,
        cut.block,
        loss,
        reduction,
        (*pairs, *dense(margin, weights), ordered, places, *results),
        (N, *split(*options, loss_weight, sft_weight)),
        warps=cut.warps,
        ticket=ticket,
        LOSS_TYPE=loss_type,
        **shape,
        SFT=sft_reduction if sft_weight else None,
        BLOCK=cut.block,
    )
    return results


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    constant_kl: float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Run `fastpref::kto_loss`."""
    N = logps.shape[0]
    block, warps, _ = launches.SMALL["kto"]
    loss, partials = outputs(reduction, logps, ref_logps)
    results = (loss, partials, loss.new_empty(N))
    tensors = (*dense(logps, ref_logps, desirable, kl), *results)
    numbers = split(constant_kl, beta, desirable_weight, undesirable_weight)
    scalars = (N, 0 if kl is None else kl.numel(), *numbers)
    launch_loss(kto_kernel, N, block, loss, reduction, tensors, scalars, warps=warps, BLOCK=block)
    return results

"""Losses of reward models: one launch gives the loss and its partial derivatives.

Each kernel restates a formula of `fastpref.reference.losses.reward`, with its derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import dense, exp, join, split
from fastpref_kernels.triton.losses.common import finish, launch_loss, log_sigmoid, outputs, sigmoid


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["chosen", "rejected", "margin"])
def pairwise_reward_kernel(
    chosen,  # (N,)
    rejected,  # (N,)
    margin,  # (N,) or None
    loss,  # () or (N,)
    partials,  # (2, N)
    scratch,
    ticket,
    N,
    constant_high,
    constant_low,
    center_high,
    center_low,
    SUMMED: tl.constexpr,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the Bradley-Terry loss of pairs of rewards, with margin and centring."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    center = join(center_high, center_low, ACC)
    r_w = tl.load(chosen + i, mask=inside, other=0.0).to(ACC)
    r_l = tl.load(rejected + i, mask=inside, other=0.0).to(ACC)
    u = r_w - r_l - join(constant_high, constant_low, ACC)
    if margin is not None:
        u -= tl.load(margin + i, mask=inside, other=0.0).to(ACC)
    losses = -log_sigmoid(u, ACC)
    by_u = -sigmoid(-u, ACC)
    by_sum = 2.0 * center * (r_w + r_l)
    losses += tl.where(center == 0.0, 0.0, center * (r_w + r_l) * (r_w + r_l))
    by_sum = tl.where(center == 0.0, 0.0, by_sum)
    scale = 1.0
    if MEAN:
        scale = 1.0 / N.to(ACC)
    tl.store(partials + i, (by_sum + by_u) * scale, mask=inside)
    tl.store(partials + N + i, (by_sum - by_u) * scale, mask=inside)
    total = tl.sum(tl.where(inside, losses, 0.0))
    finish(losses, total, scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


@triton.jit(do_not_specialize=["N", "K"], do_not_specialize_on_alignment=["rewards", "best"])
def best_of_k_kernel(
    rewards,  # (N, K)
    best,  # (N,)
    loss,  # () or (N,)
    partials,  # (N, K)
    scratch,
    ticket,
    N,
    K,
    SUMMED: tl.constexpr,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    PROMPTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the cross-entropy of the best answer."""
    i = tl.program_id(0) * PROMPTS + tl.arange(0, PROMPTS)
    k = tl.arange(0, BLOCK_K)
    inside = i < N
    tile = inside[:, None] & (k < K)[None, :]
    at = i.to(tl.int64)[:, None] * K + k[None, :]
    y = tl.load(best + i, mask=inside, other=0)
    tl.device_assert((y >= 0) & (y < K), "best is outside [0, K)")
    r = tl.load(rewards + at, mask=tile, other=-float("inf")).to(ACC)
    chosen = tl.sum(tl.where(k[None, :] == y[:, None], r, 0.0), axis=1)
    m = tl.max(r, axis=1)
    m = tl.where(inside, m, 0.0)
    e = exp(r - m[:, None], ACC)
    s = tl.sum(e, axis=1)
    s = tl.where(inside, s, 1.0)
    known = (y >= 0) & (y < K)
    losses = tl.where(inside, tl.where(known, m + tl.log(s) - chosen, float("nan")), 0.0)
    partial = e / s[:, None] - tl.where(k[None, :] == y[:, None], 1.0, 0.0)
    partial = tl.where(known[:, None], partial, float("nan"))
    if MEAN:
        partial = partial / N
    tl.store(partials + at, partial, mask=tile)
    finish(losses, tl.sum(losses), scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


@triton.jit
def _all_pairs(r, rank, counted, ACC: tl.constexpr):
    """Return the losses (P,) of all pairs of rankings (P, K), and their partial derivatives."""
    better = (rank[:, :, None] < rank[:, None, :]) & counted[:, :, None] & counted[:, None, :]
    difference = r[:, :, None] - r[:, None, :]
    pairs = tl.maximum(tl.sum(tl.sum(better.to(tl.int32), axis=2), axis=1), 1).to(ACC)
    losses = -tl.sum(tl.sum(tl.where(better, log_sigmoid(difference, ACC), 0.0), axis=2), axis=1) / pairs
    push = tl.where(better, sigmoid(-difference, ACC), 0.0)
    return losses, (tl.sum(push, axis=1) - tl.sum(push, axis=2)) / pairs[:, None]


@triton.jit
def _one_by_one(r, rank, counted, ACC: tl.constexpr):
    """Return the losses (P,) of choosing each answer among those not ranked above it, and their partial derivatives.

    Nothing is sorted.
    """
    # [prompt, chooser, choice]
    among = (rank[:, None, :] >= rank[:, :, None]) & counted[:, :, None] & counted[:, None, :]
    top = tl.max(tl.where(among, r[:, None, :], -float("inf")), axis=2)
    top = tl.where(counted, top, 0.0)
    e = tl.where(among, exp(r[:, None, :] - top[:, :, None], ACC), 0.0)
    s = tl.where(counted, tl.sum(e, axis=2), 1.0)
    losses = tl.sum(tl.where(counted, tl.log(s) + (top - r), 0.0), axis=1)
    return losses, tl.sum(e / s[:, :, None], axis=1) - tl.where(counted, 1.0, 0.0)


@triton.jit(do_not_specialize=["N", "K"], do_not_specialize_on_alignment=["rewards", "ranks", "mask"])
def ranking_kernel(
    rewards,  # (N, K)
    ranks,  # (N, K)
    mask,  # (N, K) or None
    loss,  # () or (N,)
    partials,  # (N, K)
    scratch,
    ticket,
    N,
    K,
    ALL_PAIRS: tl.constexpr,
    SUMMED: tl.constexpr,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    PROMPTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the loss of a ranking's pairs, or of the ranking as a whole. A prompt's K x K pairs stay in registers."""
    i = tl.program_id(0) * PROMPTS + tl.arange(0, PROMPTS)
    k = tl.arange(0, BLOCK_K)
    inside = i < N
    counted = inside[:, None] & (k < K)[None, :]
    at = i.to(tl.int64)[:, None] * K + k[None, :]
    if mask is not None:
        counted = counted & (tl.load(mask + at, mask=counted, other=0) != 0)
    r = tl.load(rewards + at, mask=counted, other=0.0).to(ACC)
    rank = tl.load(ranks + at, mask=counted, other=0)
    if ALL_PAIRS:
        losses, partial = _all_pairs(r, rank, counted, ACC)
    else:
        losses, partial = _one_by_one(r, rank, counted, ACC)
    if MEAN:
        partial = partial / N
    tl.store(partials + at, partial, mask=inside[:, None] & (k < K)[None, :])
    finish(losses, tl.sum(tl.where(inside, losses, 0.0)), scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    constant_margin: float,
    center_weight: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Run `fastpref::pairwise_reward_loss`."""
    N = chosen.shape[0]
    loss, partials = outputs(reduction, chosen, rejected)
    block, warps, _ = launches.SMALL["pairwise_reward"]
    tensors = (*dense(chosen, rejected, margin), loss, partials)
    scalars = (N, *split(constant_margin, center_weight))
    launch_loss(pairwise_reward_kernel, N, block, loss, reduction, tensors, scalars, warps=warps, BLOCK=block)
    return loss, partials


def best_of_k_loss(rewards: Tensor, best: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Run `fastpref::best_of_k_loss`."""
    N, K = rewards.shape
    loss, partials = outputs(reduction, rewards)
    block, warps, _ = launches.SMALL["best_of_k"]
    answers = 1 << (K - 1).bit_length()
    prompts = max(1, block // answers)
    tensors = (*dense(rewards, best), loss, partials)
    constants = {"PROMPTS": prompts, "BLOCK_K": answers}
    launch_loss(best_of_k_kernel, N, prompts, loss, reduction, tensors, (N, K), warps=warps, **constants)
    return loss, partials


def _rank(
    all_pairs: bool, rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """Launch `ranking_kernel`."""
    N, K = rewards.shape
    loss, partials = outputs(reduction, rewards)
    answers = 1 << (K - 1).bit_length()
    block, warps, _ = launches.SMALL["ranking_wide" if answers > 32 else "ranking"]
    prompts = max(1, block // answers**2)
    tensors = (*dense(rewards, ranks, mask), loss, partials)
    constants = {"ALL_PAIRS": all_pairs, "PROMPTS": prompts, "BLOCK_K": answers}
    launch_loss(ranking_kernel, N, prompts, loss, reduction, tensors, (N, K), warps=warps, **constants)
    return loss, partials


def ranking_loss(rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Run `fastpref::ranking_loss`."""
    return _rank(True, rewards, ranks, mask, reduction)


def plackett_luce_loss(rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Run `fastpref::plackett_luce_loss`."""
    return _rank(False, rewards, ranks, mask, reduction)

"""Reward-model losses: one launch gives the loss and its partial derivatives.

Each restates a formula of `fastpref.reference.losses.reward` with its derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import dense, exp, join, split
from fastpref_kernels.triton.loss import finish, launch_loss, log_sigmoid, outputs, sigmoid


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["chosen", "rejected", "margin"])
def pairwise_reward_kernel(
    chosen, rejected, margin,  # (N,)
    loss, partials, scratch, ticket,  # () or (N,), (2, N)
    N, constant_high, constant_low, center_high, center_low,
    SUMMED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bradley-Terry loss of pairs of rewards, with margin and centring."""
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
    rewards, best,  # (N, K), (N,)
    loss, partials, scratch, ticket,  # () or (N,), (N, K)
    N, K, SUMMED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, PROMPTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Cross-entropy of the best answer."""
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
    """Every pair of a ranking (P, K): losses (P,) and partial derivatives."""
    better = (rank[:, :, None] < rank[:, None, :]) & counted[:, :, None] & counted[:, None, :]
    difference = r[:, :, None] - r[:, None, :]
    pairs = tl.maximum(tl.sum(tl.sum(better.to(tl.int32), axis=2), axis=1), 1).to(ACC)
    losses = -tl.sum(tl.sum(tl.where(better, log_sigmoid(difference, ACC), 0.0), axis=2), axis=1) / pairs
    push = tl.where(better, sigmoid(-difference, ACC), 0.0)
    return losses, (tl.sum(push, axis=1) - tl.sum(push, axis=2)) / pairs[:, None]


@triton.jit
def _one_by_one(r, rank, counted, ACC: tl.constexpr):
    """Every answer's choice among those not ranked above it, which sorts nothing: losses and partial derivatives."""
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
    rewards, ranks, mask,  # (N, K)
    loss, partials, scratch, ticket,  # () or (N,), (N, K)
    N, K, ALL_PAIRS: tl.constexpr, SUMMED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, PROMPTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A ranking's pairs, or the ranking as a whole; the K x K of a prompt are in registers, never in memory."""
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
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, constant_margin: float, center_weight: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fastpref::pairwise_reward_loss`."""
    loss, partials = outputs(reduction, chosen, rejected)
    block, warps, _ = launches.SMALL["pairwise_reward"]
    launch_loss(
        pairwise_reward_kernel, chosen.shape[0], block, loss, reduction,
        [*dense(chosen, rejected, margin), loss, partials],
        (chosen.shape[0], *split(constant_margin, center_weight)), warps, BLOCK=block,
    )  # fmt: skip
    return loss, partials


def best_of_k_loss(rewards: Tensor, best: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """`fastpref::best_of_k_loss`."""
    N, K = rewards.shape
    loss, partials = outputs(reduction, rewards)
    block, warps, _ = launches.SMALL["best_of_k"]
    answers = 1 << (K - 1).bit_length()
    prompts = max(1, block // answers)
    launch_loss(
        best_of_k_kernel, N, prompts, loss, reduction, [*dense(rewards, best), loss, partials], (N, K), warps,
        PROMPTS=prompts, BLOCK_K=answers,
    )  # fmt: skip
    return loss, partials


def _of_ranking(
    all_pairs: bool, rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    N, K = rewards.shape
    loss, partials = outputs(reduction, rewards)
    answers = 1 << (K - 1).bit_length()
    block, warps, _ = launches.SMALL["ranking_wide" if answers > 32 else "ranking"]
    prompts = max(1, block // answers**2)
    launch_loss(
        ranking_kernel, N, prompts, loss, reduction, [*dense(rewards, ranks, mask), loss, partials], (N, K), warps,
        ALL_PAIRS=all_pairs, PROMPTS=prompts, BLOCK_K=answers,
    )  # fmt: skip
    return loss, partials


def ranking_loss(rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """`fastpref::ranking_loss`."""
    return _of_ranking(True, rewards, ranks, mask, reduction)


def plackett_luce_loss(rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """`fastpref::plackett_luce_loss`."""
    return _of_ranking(False, rewards, ranks, mask, reduction)

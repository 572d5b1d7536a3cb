"""Losses on log-probs and rewards: one launch gives the loss, what is reported beside it, and its partial derivatives.

Each restates a formula of `fastpref.reference` with its derivative. A program takes a tile of elements; the losses are
summed by whichever program finishes last, in the order of the programs, so two runs agree bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton.common import accumulator, dense, exp, join, log1p, on_device, split

# Elements of a program's tile: pairs, prompts x K, or prompts x K x K.
TILE = 1024
# Programs whose losses are summed at a time.
SUM_BLOCK: tl.constexpr = tl.constexpr(128)
LOSS_TYPES = {"sigmoid": 0}


@triton.jit
def _log_sigmoid(x, ACC: tl.constexpr):
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x), ACC))


@triton.jit
def _sigmoid(x, ACC: tl.constexpr):
    e = exp(-tl.abs(x), ACC)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _finish(losses, total, scratch, ticket, loss, index, inside, N, SUMMED: tl.constexpr, MEAN: tl.constexpr):
    """Store each element's loss, or have the last program store their sum or mean."""
    if SUMMED:
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        last = True
        if scratch is not None:
            tl.store(scratch + program, total)
            tl.debug_barrier()
            last = tl.atomic_add(ticket, 1) == programs - 1
            if last:
                acc = tl.zeros((SUM_BLOCK,), total.dtype)
                for start in range(0, programs, SUM_BLOCK):
                    i = start + tl.arange(0, SUM_BLOCK)
                    acc += tl.load(scratch + i, mask=i < programs, other=0.0, volatile=True)
                total = tl.sum(acc)
        if last:
            if MEAN:
                total = total / N
            tl.store(loss, total)
    else:
        tl.store(loss + index, losses, mask=inside)


@triton.jit(do_not_specialize=["N"])
def dpo_kernel(
    chosen, rejected, ref_chosen, ref_rejected,  # (N,)
    loss, partials, chosen_rewards, rejected_rewards, scratch, ticket,  # () or (N,), (N, 2 or 4), (N,), (N,)
    N, beta_high, beta_low, smoothing_high, smoothing_low,
    LOSS_TYPE: tl.constexpr, SUMMED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, implicit rewards and partial derivatives of pairs."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    beta = join(beta_high, beta_low, ACC)
    smoothing = join(smoothing_high, smoothing_low, ACC)
    w = tl.load(chosen + i, mask=inside, other=0.0).to(ACC)
    l = tl.load(rejected + i, mask=inside, other=0.0).to(ACC)  # noqa: E741 - the sheet's letter
    if ref_chosen is not None:
        w -= tl.load(ref_chosen + i, mask=inside, other=0.0).to(ACC)
        l -= tl.load(ref_rejected + i, mask=inside, other=0.0).to(ACC)  # noqa: E741
    tl.store(chosen_rewards + i, beta * w, mask=inside)
    tl.store(rejected_rewards + i, beta * l, mask=inside)
    u = beta * (w - l)
    tl.static_assert(LOSS_TYPE == 0)
    losses = -(1.0 - smoothing) * _log_sigmoid(u, ACC)
    # Left out at ε = 0, as in the formula's code: log σ(-u) may be -inf.
    losses -= tl.where(smoothing == 0.0, 0.0, smoothing * _log_sigmoid(-u, ACC))
    by_u = smoothing * _sigmoid(u, ACC) - (1.0 - smoothing) * _sigmoid(-u, ACC)

    by_w = beta * by_u
    if MEAN:
        by_w = by_w / N
    if ref_chosen is not None:
        tl.store(partials + i * 4, by_w, mask=inside)
        tl.store(partials + i * 4 + 1, -by_w, mask=inside)
        tl.store(partials + i * 4 + 2, -by_w, mask=inside)
        tl.store(partials + i * 4 + 3, by_w, mask=inside)
    else:
        tl.store(partials + i * 2, by_w, mask=inside)
        tl.store(partials + i * 2 + 1, -by_w, mask=inside)
    total = tl.sum(tl.where(inside, losses, 0.0))
    _finish(losses, total, scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


@triton.jit(do_not_specialize=["N"])
def pairwise_reward_kernel(
    chosen, rejected, margin,  # (N,)
    loss, partials, scratch, ticket,  # () or (N,), (N, 2)
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
    losses = -_log_sigmoid(u, ACC)
    by_u = -_sigmoid(-u, ACC)
    by_sum = 2.0 * center * (r_w + r_l)
    losses += tl.where(center == 0.0, 0.0, center * (r_w + r_l) * (r_w + r_l))
    by_sum = tl.where(center == 0.0, 0.0, by_sum)
    scale = 1.0
    if MEAN:
        scale = 1.0 / N.to(ACC)
    tl.store(partials + i * 2, (by_sum + by_u) * scale, mask=inside)
    tl.store(partials + i * 2 + 1, (by_sum - by_u) * scale, mask=inside)
    total = tl.sum(tl.where(inside, losses, 0.0))
    _finish(losses, total, scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


@triton.jit(do_not_specialize=["N"])
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
    _finish(losses, tl.sum(losses), scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


@triton.jit(do_not_specialize=["N"])
def ranking_kernel(
    rewards, ranks, mask,  # (N, K)
    loss, partials, scratch, ticket,  # () or (N,), (N, K)
    N, K, SUMMED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, PROMPTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All pairs of every prompt's ranking; the K x K of a prompt are in registers, never in memory."""
    i = tl.program_id(0) * PROMPTS + tl.arange(0, PROMPTS)
    k = tl.arange(0, BLOCK_K)
    inside = i < N
    counted = inside[:, None] & (k < K)[None, :]
    at = i.to(tl.int64)[:, None] * K + k[None, :]
    if mask is not None:
        counted = counted & (tl.load(mask + at, mask=counted, other=0) != 0)
    r = tl.load(rewards + at, mask=counted, other=0.0).to(ACC)
    rank = tl.load(ranks + at, mask=counted, other=0)
    better = (rank[:, :, None] < rank[:, None, :]) & counted[:, :, None] & counted[:, None, :]
    difference = r[:, :, None] - r[:, None, :]
    pairs = tl.maximum(tl.sum(tl.sum(better.to(tl.int32), axis=2), axis=1), 1).to(ACC)
    losses = -tl.sum(tl.sum(tl.where(better, _log_sigmoid(difference, ACC), 0.0), axis=2), axis=1) / pairs
    push = tl.where(better, _sigmoid(-difference, ACC), 0.0)
    partial = (tl.sum(push, axis=1) - tl.sum(push, axis=2)) / pairs[:, None]
    if MEAN:
        partial = partial / N
    tl.store(partials + at, partial, mask=inside[:, None] & (k < K)[None, :])
    _finish(losses, tl.sum(tl.where(inside, losses, 0.0)), scratch, ticket, loss, i, inside, N, SUMMED, MEAN)


def _outputs(first: Tensor, dtype: torch.dtype, columns: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Empty loss and partial derivatives; a sum or mean over nothing is 0, and no program would write it."""
    N = first.shape[0]
    shape = (N,) if reduction == "none" else ()
    loss = first.new_empty(shape, dtype=dtype) if N else first.new_zeros(shape, dtype=dtype)
    return loss, first.new_empty((N, columns), dtype=dtype)


def _launch(kernel: Any, programs: int, loss: Tensor, reduction: str, tensors: list[Any], scalars: list[Any],
            warps: int = 4, **constants: Any) -> None:  # fmt: skip
    """Launch over `programs` tiles; only several of them need a place to meet."""
    if programs == 0:
        return
    scratch = ticket = None
    if programs > 1 and reduction != "none":
        scratch = loss.new_empty(programs)
        ticket = loss.new_zeros(1, dtype=torch.int32)
    acc = accumulator(loss.dtype)
    with on_device(loss.device):
        kernel[(programs,)](
            *tensors, scratch, ticket, *scalars, SUMMED=reduction != "none", MEAN=reduction == "mean", ACC=acc,
            **constants, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def _widest(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, loss_type: str,
    beta: float, label_smoothing: float, reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::dpo_loss`."""
    dtype = _widest(chosen, rejected, ref_chosen, ref_rejected)
    loss, partials = _outputs(chosen, dtype, 2 if ref_chosen is None else 4, reduction)
    chosen_rewards, rejected_rewards = (chosen.new_empty(chosen.shape, dtype=dtype) for _ in range(2))
    _launch(
        dpo_kernel, triton.cdiv(chosen.shape[0], TILE), loss, reduction,
        [*dense(chosen, rejected, ref_chosen, ref_rejected), loss, partials, chosen_rewards, rejected_rewards],
        [chosen.shape[0], *split(beta), *split(label_smoothing)], LOSS_TYPE=LOSS_TYPES[loss_type], BLOCK=TILE, warps=8,
    )  # fmt: skip
    return loss, partials, chosen_rewards, rejected_rewards


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, constant_margin: float, center_weight: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fastpref::pairwise_reward_loss`."""
    loss, partials = _outputs(chosen, _widest(chosen, rejected), 2, reduction)
    _launch(
        pairwise_reward_kernel, triton.cdiv(chosen.shape[0], TILE), loss, reduction,
        [*dense(chosen, rejected, margin), loss, partials],
        [chosen.shape[0], *split(constant_margin), *split(center_weight)], BLOCK=TILE,
    )  # fmt: skip
    return loss, partials


def best_of_k_loss(rewards: Tensor, best: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """`fastpref::best_of_k_loss`."""
    N, K = rewards.shape
    loss, partials = _outputs(rewards, _widest(rewards), K, reduction)
    block = triton.next_power_of_2(K)
    prompts = max(1, TILE // block)
    _launch(
        best_of_k_kernel, triton.cdiv(N, prompts), loss, reduction, [*dense(rewards, best), loss, partials],
        [N, K], PROMPTS=prompts, BLOCK_K=block,
    )  # fmt: skip
    return loss, partials


def ranking_loss(rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """`fastpref::ranking_loss`."""
    N, K = rewards.shape
    loss, partials = _outputs(rewards, _widest(rewards), K, reduction)
    block = triton.next_power_of_2(K)
    prompts = max(1, TILE // block**2)
    _launch(
        ranking_kernel, triton.cdiv(N, prompts), loss, reduction, [*dense(rewards, ranks, mask), loss, partials],
        [N, K], PROMPTS=prompts, BLOCK_K=block, warps=8 if block > 32 else 4,
    )  # fmt: skip
    return loss, partials

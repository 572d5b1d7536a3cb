"""Generalized advantage estimation.

A program goes over a sequence, a block of tokens at a time, and the last block first. Within a block both recurrences
are scans from the right: the next value that counts, and A_t = δ_t + γλ·A_{t+1}. A token that does not count hands
A_{t+1} on: its coefficient is 1 and its δ is 0. The first results of a block are carried to the block before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.contract import widened
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import accumulator, dense, join, split
from fastpref_kernels.triton.launch import launch


@triton.jit
def _nearest(found_a, value_a, found_b, value_b):
    """Return the latter value where there is one, else the former."""
    return found_a | found_b, tl.where(found_b != 0, value_b, value_a)


@triton.jit
def _compose(rate_a, sum_a, rate_b, sum_b):
    """Return the function x → rate·x + sum that applies first a and then b."""
    return rate_a * rate_b, sum_b + rate_b * sum_a


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["rewards", "values", "mask"])
def gae_kernel(
    rewards,  # (B, T), as all tensors are
    values,
    mask,
    advantages,
    returns,
    T,
    gamma_high,
    gamma_low,
    decay_high,
    decay_low,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute advantages and returns of one sequence."""
    row = tl.program_id(0).to(tl.int64) * T
    gamma = join(gamma_high, gamma_low, ACC)
    decay = join(decay_high, decay_low, ACC)
    k = tl.arange(0, BLOCK)
    # These are carried from the block to the right: its first value that counts, and its first advantage.
    value_carried = tl.zeros((), ACC)
    advantage_carried = tl.zeros((), ACC)
    blocks = tl.cdiv(T, BLOCK)
    for block in range(0, blocks):
        t = (blocks - 1 - block) * BLOCK + k
        counts = tl.load(mask + row + t, mask=t < T, other=0) != 0
        reward = tl.load(rewards + row + t, mask=counts, other=0.0).to(ACC)
        value = tl.load(values + row + t, mask=counts, other=0.0).to(ACC)
        # The values of the next token, so that the scan covers only those strictly after.
        later = tl.load(mask + row + t + 1, mask=t + 1 < T, other=0) != 0
        after = tl.load(values + row + t + 1, mask=later, other=0.0).to(ACC)
        found, after = tl.associative_scan((later.to(tl.int32), after), 0, _nearest, reverse=True)
        after = tl.where(found != 0, after, value_carried)
        delta = tl.where(counts, reward + gamma * after - value, 0.0)
        rate = tl.where(counts, decay, 1.0)
        rate, advantage = tl.associative_scan((rate, delta), 0, _compose, reverse=True)
        advantage += rate * advantage_carried
        tl.store(advantages + row + t, tl.where(counts, advantage, 0.0), mask=t < T)
        tl.store(returns + row + t, tl.where(counts, advantage + value, 0.0), mask=t < T)
        first = k == 0
        advantage_carried = tl.sum(tl.where(first, advantage, 0.0))
        value_carried = tl.sum(tl.where(first, tl.where(counts, value, after), 0.0))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Run `fastpref::gae`."""
    B, T = rewards.shape
    dtype = widened(rewards.dtype, values.dtype)
    advantages, returns = (rewards.new_empty((B, T), dtype=dtype) for _ in range(2))
    block, warps, _ = launches.SMALL["gae"]
    if B and T:
        launch(
            gae_kernel,
            B,
            *(*dense(rewards, values, mask), advantages, returns, T),
            *split(gamma, gamma * lam),
            ACC=accumulator(dtype),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return advantages, returns

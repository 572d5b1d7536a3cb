"""Generalised advantage estimation in PyTorch operations, with no loop over time.

The returns R_t = A_t + V_t follow the recurrence R_t = r_t + γ(1 − λ)V_{t+1} + c·R_{t+1} with c = γλ. It has fewer
terms than the recurrence of the advantages, and so less rounding. Because c is constant, it is a product with the
triangular matrix of c's powers. Time is cut into blocks of `BLOCK` tokens. The first sums of the blocks follow the same
recurrence in c^BLOCK, with a `BLOCK`th as many terms. Each of them is added to the last term of the block before it,
and one product then gives every sum.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref_kernels.contract import widened
from fastpref_kernels.precision import own_precision

# The number of tokens in a block, which is also the number of multiplications per token.
BLOCK = 32
# The number of tokens in the sequences taken at a time, so that temporaries stay in a core's cache.
CHUNK_TOKENS = 1 << 18
# Columns of the product that gives the blocks' first sums. One column would suffice, but it would make this a
# matrix-vector product. Unlike a matrix product's, its order of summation depends on the number of rows.
HEAD_COLUMNS = 8
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@functools.lru_cache(maxsize=64)
def _powers(c: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return c^(s − t) at [s, t] of a (BLOCK, BLOCK) matrix, 0 above the diagonal."""
    steps = torch.arange(BLOCK, dtype=torch.float64, device="cpu")
    powers = (c ** (steps[:, None] - steps).clamp(min=0)).tril()
    # A denormal factor slows a product down a hundredfold.
    return powers.masked_fill(powers < torch.finfo(dtype).tiny, 0.0).to(device, dtype)


def _padded(n: int) -> int:
    """Return the length that `_discounted_sums` needs for rows of length n: n up to a block, else whole blocks."""
    return n if n <= BLOCK else n + -n % BLOCK


def _discounted_sums(x: Tensor, c: float, out: Tensor | None = None) -> Tensor:
    """Return Σ_{s≥t} c^(s−t)·x_s for each t of x (rows, n), and overwrite x. n is a `_padded` length."""
    rows, n = x.shape
    powers = _powers(c, x.dtype, x.device)
    if n <= BLOCK:
        return torch.mm(x, powers[:n, :n], out=out)
    tiles = x.view(-1, BLOCK)
    heads = (tiles @ powers[:, :HEAD_COLUMNS])[:, 0].reshape(rows, -1)
    later = _discounted_sums(F.pad(heads, (0, _padded(n // BLOCK) - n // BLOCK)), c**BLOCK)[:, 1 : n // BLOCK]
    x.view(rows, -1, BLOCK)[:, :-1, -1].add_(later, alpha=c)
    return torch.mm(tiles, powers, out=None if out is None else out.view(-1, BLOCK)).view(rows, n)


def _has_holes(mask: Tensor) -> bool:
    """Return whether the tokens that count form several runs in any row."""
    rises = (mask[:, 1:] > mask[:, :-1]).view(torch.uint8)
    # A mask that covers completions alone has no holes, and seeing that costs less than counting the runs.
    return bool(rises.numel() and rises.max() and (rises.sum(1, dtype=torch.int32) + mask[:, 0] > 1).any())


@own_precision
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Run `fastpref::gae`."""
    B, T = rewards.shape
    dtype = widened(rewards.dtype, values.dtype)
    bits = _BITS[dtype]
    advantages, returns = (rewards.new_empty((B, T), dtype=dtype) for _ in range(2))
    if T == 0:
        return advantages, returns
    # Take two rows at least, because a product of a single row is summed in another order.
    rows = max(2, CHUNK_TOKENS // T)
    size = max(2, min(B, rows))
    kept = rewards.new_empty((size, T), dtype=bits)
    gains = rewards.new_zeros((size, _padded(T)), dtype=dtype)
    sums = torch.empty_like(gains)
    for start in range(0, B, rows):
        part = slice(start, start + rows)
        counts = mask[part]
        n = counts.shape[0]
        # Keep all bits of a token that counts and none of any other. This clears a NaN too, several times as fast as
        # `where`.
        keep = kept[:n].copy_(counts.view(torch.int8).neg())
        # The memory of the advantages holds the values until the advantages are computed.
        r, v = gains[:n, :T], advantages[part]
        for held, given in ((r, rewards), (v, values)):
            torch.bitwise_and(given[part].to(dtype).view(bits), keep, out=held.view(bits))
        position, following = None, v
        if _has_holes(counts):
            # Close the holes: a token that does not count adds its 0 to one that does.
            position = counts.cumsum(1, dtype=torch.int32).sub_(1).clamp_(min=0).long()
            following = torch.zeros_like(v).scatter_add_(1, position, v)
            r.copy_(torch.zeros_like(v).scatter_add_(1, position, r))
        r[:, :-1].add_(following[:, 1:], alpha=gamma * (1 - lam))
        used = max(n, 2)
        found = _discounted_sums(gains[:used], gamma * lam, sums[:used])[:n, :T]
        if position is not None:
            found = found.gather(1, position)
        torch.bitwise_and(found.view(bits), keep, out=returns[part].view(bits))
        torch.sub(returns[part], v, out=v)
    return advantages, returns

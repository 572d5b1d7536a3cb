"""Generalised advantage estimation in PyTorch operations, with no loop over time.

Returns R_t = A_t + V_t are the recurrence R_t = r_t + γ(1 − λ)V_{t+1} + c·R_{t+1} with c = γλ: fewer terms than that of
the advantages, and so less rounding. With c constant, it is a product with the triangular matrix of c's powers. Time is
cut into blocks: the blocks' first sums, a `BLOCK`th as many, are the same recurrence in c^BLOCK; each enters the last
term of the block before it; one product then gives every sum.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref_kernels.linear import widened
from fastpref_kernels.precision import own_precision

# Tokens of a block: what a token costs in multiplications.
BLOCK = 32
# Tokens of the sequences taken at a time, so that what is made of them stays in a core's cache.
CHUNK_TOKENS = 1 << 18
# Columns of the product that gives the blocks' first sums. One would do, but makes it a matrix-vector product, whose
# order of summation, unlike a matrix product's, depends on how many rows there are.
HEAD_COLUMNS = 8
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@functools.lru_cache(maxsize=64)
def _powers(c: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(BLOCK, BLOCK): c^(s − t) at [s, t], 0 above the diagonal."""
    steps = torch.arange(BLOCK, dtype=torch.float64, device="cpu")
    powers = (c ** (steps[:, None] - steps).clamp(min=0)).tril()
    # A denormal factor slows a product down a hundredfold.
    return powers.masked_fill(powers < torch.finfo(dtype).tiny, 0.0).to(device, dtype)


def _padded(n: int) -> int:
    """How long the sums want a row of n to be."""
    return n if n <= BLOCK else n + -n % BLOCK


def _discounted_sums(x: Tensor, c: float, out: Tensor | None = None) -> Tensor:
    """Σ_{s≥t} c^(s−t)·x_s of x (rows, n), which is overwritten; n is at most BLOCK, or a multiple of it."""
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
    """Whether what counts is several runs in any row."""
    rises = (mask[:, 1:] > mask[:, :-1]).view(torch.uint8)
    # A mask of completions alone has none, which costs less to see than how many there are.
    return bool(rises.numel() and rises.max() and (rises.sum(1, dtype=torch.int32) + mask[:, 0] > 1).any())


@own_precision
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """`fastpref::gae`."""
    B, T = rewards.shape
    dtype = widened(rewards.dtype, values.dtype)
    bits = _BITS[dtype]
    advantages, returns = (rewards.new_empty((B, T), dtype=dtype) for _ in range(2))
    if T == 0:
        return advantages, returns
    # Two rows at the least: a product of a single row is summed in an order of its own.
    rows = max(2, CHUNK_TOKENS // T)
    size = max(2, min(B, rows))
    kept = rewards.new_empty((size, T), dtype=bits)
    gains = rewards.new_zeros((size, _padded(T)), dtype=dtype)
    sums = torch.empty_like(gains)
    for start in range(0, B, rows):
        part = slice(start, start + rows)
        counts = mask[part]
        n = counts.shape[0]
        # Every bit of a token that counts and none of another: that clears a NaN too, several times as fast as `where`.
        keep = kept[:n].copy_(counts.view(torch.int8).neg())
        # Values wait where the advantages are to be.
        r, v = gains[:n, :T], advantages[part]
        for held, given in ((r, rewards), (v, values)):
            torch.bitwise_and(given[part].to(dtype).view(bits), keep, out=held.view(bits))
        position, following = None, v
        if _has_holes(counts):
            # Holes are closed: a token that does not count adds its 0 to one that does.
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

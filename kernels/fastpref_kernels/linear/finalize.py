"""Log-probs, statistics and what a backward needs, from the sums of rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastpref_kernels import eager
from fastpref_kernels.linear.backend import COLUMNS, LIMIT, Backend, widened
from fastpref_kernels.linear.rows import Rows

_NEAR = 600.0  # below this, exp(a - z_y) is a float64 with room to spare


def kept_tiles(shares: Tensor, labels: Tensor, filter_eps: float) -> Tensor:
    """Return which tiles of each row carry gradient (chunks, R): enough mass, or the label; NaN stays to be seen."""
    chunk = torch.arange(shares.shape[0], device=shares.device)[:, None]
    return ~(shares < filter_eps) | (torch.div(labels, COLUMNS, rounding_mode="floor") == chunk)


def _finalize_rows(
    backend: Backend, rows: Rows, state: Tensor, whole_state: Tensor, vocabulary: Tensor | int, store: Tensor | None,
    transform: tuple[float, float, float | None], stats: int,
) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:  # fmt: skip
    """Return log-probs, anchor and 1/S, each (R,), and the statistics asked for, by bit.

    Args:
        backend: whose kernels change what is kept.
        rows: with labels that are columns here, or outside of them.
        state: (8, R), the sums over the columns here, which may be a shard of all.
        whole_state: (8, R), the sums over all columns, at an anchor that is no lower; `state` where they are all here.
        vocabulary: the number of all columns.
        store: (R, V) or None: receives what the gradient's products need at the label.
        transform: logit_scale, temperature and softcap.
        stats: bits of the statistics asked for.
    """
    own, highest, *sums = state[0], *whole_state
    rest, weighted, squares, total, before, after, z_y = sums
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    e_y = (z_y - highest).exp()
    whole = rest + e_y
    gap = highest - z_y
    near = -torch.log1p(rest * gap.clamp(max=_NEAR).exp())
    logp = torch.where(gap < _NEAR, near, -gap - whole.log()).masked_fill(z_y == torch.inf, torch.nan)
    # A shard keeps its own anchor, unless that is so far from the anchor of all columns that float32 has no room.
    moved = ~(highest - own < math.log(LIMIT))
    anchor = torch.where(moved, highest, own)
    if store is not None and len(rows) and store.shape[1]:
        store = store[: len(rows)]
        if whole_state is not state:
            factor = torch.where(own == -torch.inf, 0.0, own - highest).exp()
            backend.rescale(store, torch.where(moved, factor, 1.0)[None], store.shape[1])
        of_z = eager.Transform.of(*transform)
        at_label = -rest * (highest - anchor).exp() * of_z.derivative(z_y / of_z.rate)
        here = torch.arange(len(rows), device=store.device), rows.label.clamp(0, store.shape[1] - 1)
        inside = rows.label == here[1]
        store[here] = torch.where(inside, at_label.to(store.dtype), store[here])
    values: dict[int, Callable[[], Tensor]] = {
        0: lambda: highest + whole.log(),
        1: lambda: torch.where(
            gap < _NEAR,  # from the label, where an entropy near 0 keeps its digits
            -logp - (weighted + gap * rest) / whole,
            whole.log() - (weighted - (e_y * gap).masked_fill(e_y == 0, 0.0)) / whole,
        ),
        2: lambda: total / vocabulary,
        3: lambda: (before < z_y) & (after <= z_y),
        4: lambda: (squares + e_y * e_y).log() - 2 * whole.log(),
    }
    inverse = (anchor - highest).exp() / whole
    return logp, anchor, inverse, {bit: value() for bit, value in values.items() if stats >> bit & 1}


def results(
    backend: Backend, hidden_dtype: torch.dtype, rows: Rows, state: Tensor, whole_state: Tensor, shares: Tensor,
    vocabulary: Tensor | int, store: Tensor | None, transform: tuple[float, float, float | None], stats: int,
    filter_eps: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the results of `fastpref::linear_logprobs` from the sums of rows."""
    dtype = widened(hidden_dtype)
    logp, anchor, inverse, found = _finalize_rows(
        backend, rows, state, whole_state, vocabulary, store, transform, stats
    )  # fmt: skip
    if len(shares):
        scale = inverse * torch.where(state[0] == -torch.inf, 0.0, state[0] - anchor).exp()
        shares = (shares * scale).float()
    if stats >> 5 & 1:
        dropped = shares.new_zeros(len(rows))
        if filter_eps is not None:
            dropped = shares.masked_fill(kept_tiles(shares, rows.label, filter_eps), 0.0).sum(0)
        found[5] = dropped
    statistics = [
        rows.spread(found[bit], torch.bool if bit == 3 else dtype)
        if stats >> bit & 1
        else logp.new_zeros(0, dtype=torch.bool if bit == 3 else dtype)
        for bit in range(6)
    ]
    norm = torch.stack([anchor, inverse, logp, *([found[1]] if stats & 2 else [])])
    return rows.spread(logp, dtype), rows.spread(norm, dtype), rows.spread(shares, torch.float32), *statistics


def finalize_shard(
    backend: Backend, hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shard: Tensor, sums: Tensor,
    whole_sums: Tensor, masses: Tensor, store: Tensor | None, ignore_index: int, shift: bool, logit_scale: float,
    temperature: float, softcap: float | None, stats: int, count: int | None, filter_eps: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::linear_finalize`."""
    rows = Rows.of(labels, cu_seqlens, ignore_index, shift, count)
    every = slice(None)
    return results(
        backend, hidden.dtype, rows, rows.take(sums, every), rows.take(whole_sums, every), rows.take(masses, every),
        shard[1], store, (logit_scale, temperature, softcap), stats, filter_eps,
    )  # fmt: skip

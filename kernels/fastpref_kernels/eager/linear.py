"""The row passes of log-probs from hidden states in PyTorch, the definition: other devices run each as one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref_kernels.contract import COLUMNS, ENTROPY_LIMIT, LIMIT, RowSums, Statistic, Transform, widened


def fold(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    column: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    stats: int,
    state: Tensor,
    anchors: Tensor,
    masses: Tensor,
    store: Tensor | None,
) -> None:
    """Add a tile of logits to the sums of its rows.

    Args:
        z: (R, C) products hidden @ weightᵀ, float32 or float64; may be written to.
        bias: (C,) or None.
        targets: (R,) labels of the rows.
        column: the vocabulary column at which the tile starts.
        logit_scale: multiplies the logits.
        temperature: divides the logits.
        softcap: caps the logits, or None.
        stats: the bits of the statistics that are asked for.
        state: (9, R) float64, in and out: the sums over the tiles so far, `contract.RowSums`.
        anchors: (R,) float64, out: the anchor of this tile.
        masses: (R,) float64, out: Σ_{j≠label} exp d of this tile.
        store: (R, C) or None, out: exp(d)·dz/dx, and 0 at the label.
    """
    z, slope = Transform.of(logit_scale, temperature, softcap).z(z, bias)
    anchor, rest, weighted, squares, total, label, highest_before, highest_after, second = RowSums.of(state)
    columns = torch.arange(column, column + z.shape[1], device=z.device)
    before, after = columns < targets[:, None], columns > targets[:, None]
    own = ~(before | after)
    others = z.masked_fill(own, -torch.inf)
    if stats & Statistic.MEAN_LOGITS:
        total += z.sum(-1, dtype=torch.float64)
    if stats & Statistic.TOP2_MARGIN:
        # The second largest of the logits so far and of this tile. Before this tile, the largest is one of the two
        # maxima.
        best = torch.maximum(highest_before, highest_after)
        tile_best = torch.nn.functional.pad(others, (0, 1), value=-torch.inf).topk(2).values.double()
        second.copy_(torch.stack([best, second, *tile_best.unbind(1)]).topk(2, dim=0).values[1])
    if stats & (Statistic.IS_TOP1 | Statistic.TOP2_MARGIN):
        for highest, side in ((highest_before, before), (highest_after, after)):
            highest.copy_(torch.maximum(highest, z.masked_fill(~side, -torch.inf).amax(-1).double()))
    label.copy_(torch.where(own.any(-1), z.masked_fill(~own, 0.0).sum(-1).double(), label))
    tile = (others - anchor[:, None].to(z.dtype)).exp().sum(-1, dtype=torch.float64)
    redone = ~(rest + tile < (ENTROPY_LIMIT if stats & Statistic.ENTROPY else LIMIT))
    old = torch.where((rest > 0) | anchor.isfinite(), anchor, -torch.inf)
    moved = torch.where(redone, torch.maximum(old, others.amax(-1).double()), anchor)
    # If all logits so far are -inf, use any number: the sum is then 0 and not NaN, and the row stays without an anchor.
    base = moved.masked_fill(moved == -torch.inf, 0.0)
    gap = torch.where(redone, anchor - base, 0.0)
    factor = gap.exp()
    gap = gap.masked_fill(factor == 0, 0.0)
    d = others - base[:, None].to(z.dtype)
    e = d.exp()
    weighted.copy_(factor * (weighted + gap * rest) + (e * d.masked_fill(e == 0, 0.0)).sum(-1, dtype=torch.float64))
    squares.copy_(factor * factor * squares + (e * e).sum(-1, dtype=torch.float64))
    masses.copy_(e.sum(-1, dtype=torch.float64))
    rest.copy_(factor * rest + masses)
    anchor.copy_(moved)
    anchors.copy_(moved)
    if store is not None:
        store.copy_(e * slope)


def fold_backward(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    column: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    norm: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    """Turn a tile of logits into their gradient.

    Args:
        z: (R, C) products hidden @ weightᵀ; may be written to.
        bias: (C,) or None.
        targets: (R,) labels of the rows.
        column: the vocabulary column at which the tile starts.
        logit_scale: multiplies the logits.
        temperature: divides the logits.
        softcap: caps the logits, or None.
        norm: (3, R): anchor, 1/S and log-prob of each row, and its entropy where there is a fourth.
        grad: (R,) or None, of the log-probs.
        grad_entropy: (R,) or None, of the entropies.
        out: (R, C), may be `z`.
    """
    z, slope = Transform.of(logit_scale, temperature, softcap).z(z, bias)
    anchor, inverse, logp = (norm[i][:, None] for i in range(3))
    own = torch.arange(column, column + z.shape[1], device=z.device) == targets[:, None]
    d = z - anchor
    p = d.exp() * inverse
    result = torch.zeros_like(z)
    if grad is not None:
        result = torch.where(own, -grad[:, None] * torch.expm1(logp), -grad[:, None] * p)
    if grad_entropy is not None:
        entropy = norm[3][:, None]
        log_p = torch.where(own, logp, d + inverse.log())
        p = torch.where(own, logp.exp(), p)
        result = result - grad_entropy[:, None] * p * (log_p + entropy).masked_fill(p == 0, 0.0)
    out.copy_(result * slope)


def dot(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the dot product of each row of x (R, H) and row labels[r] of weight (V, H), (R,), in float32 at least."""
    dtype = widened(x.dtype)
    return (x.to(dtype) * weight[labels].to(dtype)).sum(-1)


def gather(x: Tensor, source: Tensor, scale: Tensor | None) -> Tensor:
    """Return rows `source` (R,) of x (M, H), times `scale` (R,) if it is given; 0 where there is no such row."""
    rows = x.index_select(0, source.clamp(max=max(len(x) - 1, 0)))
    rows.masked_fill_((source >= len(x))[:, None], 0.0)
    return rows if scale is None else (rows.to(scale.dtype) * scale[:, None]).to(x.dtype)


def scatter(out: Tensor, source: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    """Add rows (R, H), times `scale` (R,) if it is given, to rows `source` (R,) of out (M, H) if they exist."""
    if not len(out):
        return
    values = rows if scale is None else rows * scale[:, None]
    values = values.masked_fill((source >= len(out))[:, None], 0.0)
    out.index_add_(0, source.clamp(max=len(out) - 1), values.to(out.dtype))


def rescale(kept: Tensor, factors: Tensor, columns: int) -> None:
    """Multiply every piece of `columns` columns of kept exponentials (R, V) by its factor (pieces, R).

    Only the few rows with a factor other than 1 are touched. The host reads which rows these are; a kernel on a device
    returns where the factor is 1.
    """
    pieces = max(COLUMNS // columns, 1)
    for first in range(0, len(factors), pieces):
        part = factors[first : first + pieces]
        rows = (part != 1).any(0).nonzero()[:, 0]
        if not len(rows):
            continue
        begin, end = first * columns, min((first + len(part)) * columns, kept.shape[1])
        wide = widened(kept.dtype)
        factor = part[:, rows].to(wide).t()[..., None].expand(-1, -1, columns).reshape(len(rows), -1)
        kept[rows, begin:end] = kept[rows, begin:end].mul_(factor[:, : end - begin])

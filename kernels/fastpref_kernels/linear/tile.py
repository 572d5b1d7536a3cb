"""The definition of the row passes over a tile of logits, in PyTorch: what the kernels do in one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref_kernels import eager
from fastpref_kernels.linear.backend import ENTROPY_LIMIT, LIMIT


def transformed(
    x: Tensor, bias: Tensor | None, logit_scale: float, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | float]:
    """Return z of raw logits x, and dz/dx."""
    if bias is not None:
        x = x + bias.to(x.dtype)
    transform = eager.Transform.of(logit_scale, temperature, softcap)
    u = transform.u(x)
    return u * transform.rate, transform.derivative(u)


def fold(
    z: Tensor, bias: Tensor | None, targets: Tensor, column: int, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, state: Tensor, anchors: Tensor, masses: Tensor, store: Tensor | None,
) -> None:  # fmt: skip
    """Add a tile of logits to the sums of its rows: the definition, which the kernels do in one pass.

    Args:
        z: (R, C) products hidden @ weightᵀ, float32 or float64; may be written to.
        bias: (C,) or None.
        targets: (R,) the rows' labels.
        column: the vocabulary column the tile starts at.
        logit_scale: as in `logprobs`, like the two after it.
        temperature: divides the logits.
        softcap: caps the logits.
        stats: bits of the statistics asked for.
        state: (8, R) float64, in and out, of d_j = z_j - anchor over the tiles so far: the anchor, -inf while there is
            none (the label's logit and all others are -inf); Σ exp d, Σ d·exp d and Σ exp 2d over j ≠ label; Σ z over
            all j; the maxima of z before and after the label; z of the label.
        anchors: (R,) float64, out: the anchor of this tile.
        masses: (R,) float64, out: this tile's Σ_{j≠label} exp d.
        store: (R, C) or None, out: exp(d)·dz/dx, and 0 at the label.
    """
    z, slope = transformed(z, bias, logit_scale, temperature, softcap)
    anchor, rest, weighted, squares, total, highest_before, highest_after, label = state
    columns = torch.arange(column, column + z.shape[1], device=z.device)
    before, after = columns < targets[:, None], columns > targets[:, None]
    if stats & 4:
        total += z.sum(-1, dtype=torch.float64)
    if stats & 8:
        for highest, side in ((highest_before, before), (highest_after, after)):
            highest.copy_(torch.maximum(highest, z.masked_fill(~side, -torch.inf).amax(-1).double()))
    own = ~(before | after)
    label.copy_(torch.where(own.any(-1), z.masked_fill(~own, 0.0).sum(-1).double(), label))
    others = z.masked_fill(own, -torch.inf)
    tile = (others - anchor[:, None].to(z.dtype)).exp().sum(-1, dtype=torch.float64)
    redone = ~(rest + tile < (ENTROPY_LIMIT if stats & 2 else LIMIT))
    old = torch.where((rest > 0) | anchor.isfinite(), anchor, -torch.inf)
    moved = torch.where(redone, torch.maximum(old, others.amax(-1).double()), anchor)
    # Any number where there is nothing but -inf yet: a sum of 0 and no NaN, and the row stays without an anchor.
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
    z: Tensor, bias: Tensor | None, targets: Tensor, column: int, logit_scale: float, temperature: float,
    softcap: float | None, norm: Tensor, grad: Tensor | None, grad_entropy: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Turn a tile of logits into their gradient: the definition, which the kernels do in one pass.

    Args:
        z: (R, C) products hidden @ weightᵀ; may be written to.
        bias: (C,) or None.
        targets: (R,) the rows' labels.
        column: the vocabulary column the tile starts at.
        logit_scale: as in `logprobs`, like the two after it.
        temperature: divides the logits.
        softcap: caps the logits.
        norm: (3, R): anchor, 1/S and log-prob of each row, and its entropy where there is a fourth.
        grad: (R,) or None, of the log-probs.
        grad_entropy: (R,) or None, of the entropies.
        out: (R, C), may be `z`.
    """
    z, slope = transformed(z, bias, logit_scale, temperature, softcap)
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

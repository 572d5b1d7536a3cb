"""Log-probs from logits in chunked PyTorch, for a CPU without a compiler and for devices without kernels of ours.

Memory stays flat: a few rows at a time are widened to float32, so a backward holds the gradient and one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.contract import (
    PLACE,
    STATISTICS,
    Statistic,
    Transform,
    check_boundaries,
    check_labels,
    empty_statistics,
    scored_targets,
)

# Elements of one chunk of logits. 2^18 float32 are 1 MiB, and a chunk has a handful of temporaries.
CHUNK_ELEMENTS = 1 << 18


def _sequence_of(rows: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the sequence of each position of rows (B, T'), in a shape that broadcasts to it."""
    if cu_seqlens is None:
        return torch.arange(rows.shape[0], device=rows.device)[:, None].expand(rows.shape)
    positions = torch.arange(rows.shape[1], device=rows.device)
    return torch.bucketize(positions, cu_seqlens[1:].long().contiguous(), right=True)[None]


def _chunks(scored: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the (batch, time) indices of the scored rows, a chunk at a time."""
    batch, time = scored.nonzero(as_tuple=True)
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, batch.shape[0], rows):
        yield batch[start : start + rows], time[start : start + rows]


class _Rows(NamedTuple):
    """A chunk of rows, transformed and summed.

    Attributes:
        u: (R, V), u of the logits.
        rate: dz/du.
        label: (R, 1).
        highest: (R, 1), the maximum of u.
        d: (R, V), rate·(u − highest).
        e: (R, V), exp d.
        total: (R, 1), Σ e.
    """

    u: Tensor
    rate: float
    label: Tensor
    highest: Tensor
    d: Tensor
    e: Tensor
    total: Tensor


# Each statistic of a chunk, (R,).
_STATISTICS: dict[Statistic, Callable[[_Rows], Tensor]] = {
    Statistic.LSE: lambda r: (r.highest * r.rate + r.total.log())[:, 0],
    Statistic.ENTROPY: lambda r: r.total.log()[:, 0] - (r.e * r.d.masked_fill(r.e == 0, 0)).sum(-1) / r.total[:, 0],
    Statistic.MEAN_LOGITS: lambda r: r.u.mean(-1) * r.rate,
    Statistic.IS_TOP1: lambda r: r.u.argmax(-1) == r.label[:, 0],
    Statistic.LOG_SUM_SQ_PROBS: lambda r: (r.e * r.e).sum(-1).log() - 2 * r.total.log()[:, 0],
    Statistic.TOP2_MARGIN: lambda r: _top2_margin(r.u) * r.rate,
}


def _top2_margin(u: Tensor) -> Tensor:
    """Return the largest of each row (R, V) minus the second largest, which is −inf where V is 1."""
    best = torch.nn.functional.pad(u, (0, 1), value=-torch.inf).topk(2).values
    return best[:, 0] - best[:, 1]


def logprobs(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    reduction: str,
    stats: int,
) -> tuple[Tensor, ...]:
    """Run `fastpref::logprobs`."""
    transform = Transform.of(logit_scale, temperature, softcap)
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, labels.shape[1])
    targets, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
    check_labels(targets, scored, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    norm = logits.new_zeros((4 if stats & Statistic.ENTROPY else 3, *targets.shape), dtype=dtype)
    statistics = empty_statistics(logits, STATISTICS, stats, targets.shape, dtype)
    asked = [(member, values) for member, values in zip(STATISTICS.values(), statistics, strict=True) if stats & member]
    for _, values in asked:
        values.zero_()
    for rows in _chunks(scored, logits.shape[-1]):
        u = transform.u(logits[rows].to(dtype))
        y = targets[rows].long()[:, None]
        highest = u.amax(-1, keepdim=True)
        d = (u - highest) * transform.rate
        d_y = d.gather(-1, y)
        e = d.exp()
        rest = e.scatter(-1, y, 0.0).sum(-1, keepdim=True)
        total = rest + d_y.exp()
        # log1p over the other entries keeps the digits of a log-prob near 0; d_y - log is for a label far from the top.
        logp = torch.where(d_y == 0, -torch.log1p(rest), d_y - total.log())
        chunk = _Rows(u, transform.rate, y, highest, d, e, total)
        for member, values in asked:
            values[rows] = _STATISTICS[member](chunk)
        for plane, values in enumerate((highest, 1 / total, logp)):
            norm[plane][rows] = values[:, 0]
    if stats & Statistic.ENTROPY:
        norm[3] = statistics[PLACE[Statistic.ENTROPY]]
    logps = norm[2]
    if reduction == "none":
        empty = logps.new_empty(0), norm, labels.new_empty(0, dtype=torch.int32)
        return logps.clone(), *empty, *statistics
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    index = _sequence_of(scored, cu_seqlens).reshape(-1)
    counts = torch.zeros(sequences, dtype=torch.int32, device=labels.device)
    counts.index_add_(0, index, scored.reshape(-1).int())
    # A weight of 0 leaves its token out, also where its log-prob is -inf.
    weighted = logps if weights is None else weights * logps.masked_fill(weights == 0, 0.0)
    sums = logps.new_zeros(sequences).index_add_(0, index, weighted.reshape(-1))
    if reduction == "mean":
        sums = sums / counts.clamp(min=1)
    return logps.clone(), sums, norm, counts, *statistics


def logprobs_backward(
    out: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    weights: Tensor | None,
    norm: Tensor,
    counts: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    reduction: str,
) -> None:
    """Write the gradient of logits to `out`, which may be the logits themselves."""
    transform = Transform.of(logit_scale, temperature, softcap)
    anchor, inverse, logps, *entropy = norm
    targets, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
    if grad is not None and reduction != "none":
        if reduction == "mean":
            grad = grad / counts.clamp(min=1)
        grad = grad[_sequence_of(scored, cu_seqlens)]
        if weights is not None:
            grad = grad * weights
    for rows in _chunks(scored, logits.shape[-1]):
        u = transform.u(logits[rows].to(logps.dtype))
        y = targets[rows].long()[:, None]
        d = (u - anchor[rows][:, None]) * transform.rate
        p = d.exp() * inverse[rows][:, None]
        out_rows = torch.zeros_like(u)
        if grad is not None:
            g = grad[rows][:, None]
            out_rows = (-g * p).scatter(-1, y, -g * torch.expm1(logps[rows][:, None]))
        if grad_entropy is not None:
            surprise = d + inverse[rows][:, None].log() + entropy[0][rows][:, None]
            out_rows -= grad_entropy[rows][:, None] * p * surprise.masked_fill(p == 0, 0)
        out[rows] = (out_rows * transform.derivative(u)).to(out.dtype)
    keep = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    keep[:, : scored.shape[1]] = scored
    out[~keep] = 0

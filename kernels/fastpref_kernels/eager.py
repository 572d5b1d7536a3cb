"""The operators in chunked PyTorch: for a CPU without a compiler, and for devices that have no kernel of ours.

Memory stays flat: a few rows at a time are widened to float32, so a backward holds the gradient and one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one chunk of logits. 2^18 float32 are 1 MiB, and a chunk has a handful of temporaries.
CHUNK_ELEMENTS = 1 << 18


class Transform(NamedTuple):
    """z = rate·u(x), where u is x itself, or softcap·tanh(x·scale/softcap)."""

    rate: float
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, logit_scale: float, temperature: float, softcap: float | None) -> Transform:
        """The transform of these three scalars."""
        if softcap is None:
            return cls(logit_scale / temperature, 1.0, None)
        return cls(1.0 / temperature, logit_scale, softcap)

    def u(self, x: Tensor) -> Tensor:
        """u(x)."""
        return x if self.softcap is None else self.softcap * torch.tanh(x * (self.scale / self.softcap))

    def derivative(self, u: Tensor) -> Tensor | float:
        """dz/dx where u(x) = u."""
        return self.rate if self.softcap is None else self.rate * self.scale * (1 - (u / self.softcap) ** 2)


def scored_targets(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool) -> tuple[Tensor, Tensor]:
    """The label of every position (B, T'), and whether it is scored."""
    targets = labels[:, 1:] if shift else labels
    scored = targets != ignore_index
    if shift and cu_seqlens is not None:
        starts = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        # Where nobody checks boundaries, one past the end must not end the process: a GPU asserts that indices fit.
        starts.index_fill_(0, cu_seqlens.long().clamp(0, labels.shape[1]), True)
        scored = scored & ~starts[1:-1]
    return targets, scored


def _sequence_of(rows: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sequence of every position of a tensor shaped like rows (B, T')."""
    if cu_seqlens is None:
        return torch.arange(rows.shape[0], device=rows.device)[:, None].expand(rows.shape)
    positions = torch.arange(rows.shape[1], device=rows.device)
    return torch.bucketize(positions, cu_seqlens[1:].long().contiguous(), right=True)[None]


def boundaries_are_wrong(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return whether boundaries do not rise from 0 to the number of tokens, () bool, without a read on the host."""
    ends = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != tokens)
    return ends | (cu_seqlens.diff() < 0).any()


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise `ValueError` unless boundaries rise from 0 to the number of tokens."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {bounds}")


def check_labels(targets: Tensor, scored: Tensor, vocabulary: int) -> None:
    """Raise `IndexError` at the first scored label outside the vocabulary."""
    bad = scored & ((targets < 0) | (targets >= vocabulary))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise IndexError(
            f"label {int(targets[row, column])} at scored position [{row}, {column}] is outside [0, {vocabulary}) "
            "and is not ignore_index"
        )


def _chunks(scored: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(batch, time) indices of the scored rows, a chunk at a time."""
    batch, time = scored.nonzero(as_tuple=True)
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, batch.shape[0], rows):
        yield batch[start : start + rows], time[start : start + rows]


def logprobs(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None, ignore_index: int, shift: bool,
    logit_scale: float, temperature: float, softcap: float | None, reduction: str, stats: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::logprobs`."""
    transform = Transform.of(logit_scale, temperature, softcap)
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, labels.shape[1])
    targets, scored = scored_targets(labels, cu_seqlens, ignore_index, shift)
    check_labels(targets, scored, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logps, anchor, inverse, lse, entropy, mean, log_sum_sq = logits.new_zeros((7, *targets.shape), dtype=dtype)
    top1 = torch.zeros_like(scored)
    for rows in _chunks(scored, logits.shape[-1]):
        u = transform.u(logits[rows].to(dtype))
        y = targets[rows].long()[:, None]
        m = u.amax(-1, keepdim=True)
        d = (u - m) * transform.rate
        d_y = d.gather(-1, y)
        e = d.exp()
        rest = e.scatter(-1, y, 0.0).sum(-1, keepdim=True)
        total = rest + d_y.exp()
        # log1p over the other entries keeps the digits of a log-prob near 0; d_y - log is for a label far from the top.
        logp = torch.where(d_y == 0, -torch.log1p(rest), d_y - total.log())
        logps[rows], anchor[rows], inverse[rows] = logp[:, 0], m[:, 0], 1 / total[:, 0]
        lse[rows] = (m * transform.rate + total.log())[:, 0]
        top1[rows] = u.argmax(-1) == y[:, 0]
        if stats & 2:
            entropy[rows] = total.log()[:, 0] - (e * d.masked_fill(e == 0, 0)).sum(-1) / total[:, 0]
        if stats & 4:
            mean[rows] = u.mean(-1) * transform.rate
        if stats & 16:
            log_sum_sq[rows] = (e * e).sum(-1).log() - 2 * total.log()[:, 0]
    statistics = (lse, entropy, mean, top1, log_sum_sq)
    asked = tuple(s.clone() if stats >> bit & 1 else s.new_empty(0) for bit, s in enumerate(statistics))
    norm = torch.stack((anchor, inverse, logps, *([entropy] if stats & 2 else [])))
    if reduction == "none":
        return logps.clone(), logps.new_empty(0), norm, labels.new_empty(0, dtype=torch.int32), *asked
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    index = _sequence_of(scored, cu_seqlens).reshape(-1)
    counts = torch.zeros(sequences, dtype=torch.int32, device=labels.device)
    counts.index_add_(0, index, scored.reshape(-1).int())
    # A weight of 0 leaves its token out, also where its log-prob is -inf.
    weighted = logps if weights is None else weights * logps.masked_fill(weights == 0, 0.0)
    sums = logps.new_zeros(sequences).index_add_(0, index, weighted.reshape(-1))
    if reduction == "mean":
        sums = sums / counts.clamp(min=1)
    return logps.clone(), sums, norm, counts, *asked


def write_gradient(
    out: Tensor, grad: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, labels: Tensor,
    cu_seqlens: Tensor | None, weights: Tensor | None, norm: Tensor, counts: Tensor,
    ignore_index: int, shift: bool, logit_scale: float, temperature: float, softcap: float | None, reduction: str,
) -> None:  # fmt: skip
    """Write the gradient of logits to `out`, which may be the logits themselves."""
    transform = Transform.of(logit_scale, temperature, softcap)
    anchor, inverse, logps, *entropy = norm
    targets, scored = scored_targets(labels, cu_seqlens, ignore_index, shift)
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

"""Log-probs from logits: the definition in plain PyTorch.

Differentiable, exact in float64, and written to be read. It materialises float32 (or float64) copies of the scored
rows: `fastpref.token_logprobs` computes the same numbers without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref._checks import (
    REDUCTIONS,
    check_bool,
    check_boundaries,
    check_choice,
    check_labels,
    check_ld,
    check_logits,
    check_same_device,
    check_scoring,
    check_transform,
    shape_error,
)
from fastpref._results import check_stats, result_type
from fastpref.reference.distributed import whole_logits


def transform_logits(logits: Tensor, *, temperature: float, logit_scale: float, softcap: float | None) -> Tensor:
    """z ← softcap·tanh(z·logit_scale/softcap)/temperature in float32 (float64 for float64), each part optional."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if temperature != 1.0:
        z = z / temperature
    return z


def row_statistic(name: str, z: Tensor, logp: Tensor, targets: Tensor) -> Tensor:
    """One per-token statistic of rows z (n, V) with log-probs logp (n, V) and targets (n,) -> (n,)."""
    if name == "entropy":  # -Σ p log p; where p is 0, so is the term
        p = logp.exp()
        return -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    z, logp = z.detach(), logp.detach()
    if name == "lse":
        return z.logsumexp(-1)
    if name == "mean_logits":
        return z.mean(-1)
    if name == "is_top1":
        return z.argmax(-1) == targets
    return (2 * logp).logsumexp(-1)


def scored_targets(
    labels: Tensor, cu_seqlens: Tensor | None, *, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor]:
    """The label each position is scored against, and whether it is scored at all.

    Args:
        labels: (..., T).
        cu_seqlens: None, or the packed boundaries (S+1,): the shift then never crosses one.
        ignore_index: the label that is not scored.
        shift: position t is scored against label t+1.

    Returns:
        targets, scored: (..., T-1) with `shift`, else (..., T).
    """
    targets = labels[..., 1:] if shift else labels
    scored = targets != ignore_index
    if shift and cu_seqlens is not None:
        following = torch.arange(labels.shape[-1], device=labels.device)[1:]
        bounds = cu_seqlens.long().contiguous()
        nearest = torch.searchsorted(bounds, following).clamp(max=len(bounds) - 1)
        # Not torch.isin, which has a GPU wait where there are many boundaries.
        scored = scored & (bounds[nearest] != following)
    return targets, scored


def count_sequences(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many sequences (B, T), (T,) or packed labels hold."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return labels.shape[0] if labels.dim() == 2 else 1


def sequence_index(scored: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sequence every position of `scored` (..., T) belongs to, of the same shape."""
    if cu_seqlens is None:
        rows = scored.numel() // max(scored.shape[-1], 1)
        return torch.arange(rows, device=scored.device).repeat_interleave(scored.shape[-1]).view(scored.shape)
    positions = torch.arange(scored.shape[-1], device=scored.device)
    index = torch.bucketize(positions, cu_seqlens[1:].long().contiguous(), right=True)
    # Boundaries that do not reach the end are refused where values are checked, not by an index here.
    return index.clamp(max=max(cu_seqlens.shape[0] - 2, 0)).expand(scored.shape)


def sequence_lengths(scored: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Tensor:
    """How many positions of each sequence are scored, (S,) int64."""
    if cu_seqlens is None:
        return scored.sum(-1).reshape(sequences)
    counts = torch.zeros(sequences, dtype=torch.long, device=scored.device)
    return counts.index_add(0, sequence_index(scored, cu_seqlens).reshape(-1), scored.reshape(-1).long())


def ld_weights(
    scored: Tensor,
    cu_seqlens: Tensor | None,
    sequences: int,
    ld_alpha: float,
    shared_lengths: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Per-token weights of LD-DPO (arXiv 2409.06411): 1 on a sequence's first `shared_lengths` scored tokens, then α.

    Args:
        scored: (..., T) bool.
        cu_seqlens: None, or packed boundaries (S+1,).
        sequences: S.
        ld_alpha: α, the weight of the tail.
        shared_lengths: (S,), or None: the sequences are [chosen; rejected] and each pair shares its shorter length.

    Returns:
        Weights of `scored`'s shape, in `dtype`.
    """
    index = sequence_index(scored, cu_seqlens).reshape(-1)
    flat = scored.reshape(-1).long()
    counts = sequence_lengths(scored, cu_seqlens, sequences)
    if shared_lengths is None:
        if sequences % 2:
            raise ValueError(
                f"ld_alpha without shared_lengths takes the sequences as [chosen; rejected], an even number; "
                f"got {sequences}"
            )
        chosen, rejected = counts.chunk(2)
        shared_lengths = torch.minimum(chosen, rejected).repeat(2)
    else:
        if shared_lengths.shape != (sequences,):
            raise shape_error("shared_lengths", shared_lengths, f"({sequences},), one length for each sequence")
        check_same_device("shared_lengths", shared_lengths, "labels", scored)
    before = counts.cumsum(0) - counts
    ordinal = flat.cumsum(0) - flat - before[index]
    one = torch.ones((), dtype=dtype, device=scored.device)
    weights = torch.where(ordinal < shared_lengths[index], one, ld_alpha)
    return weights.view(scored.shape)


def weigh(logps: Tensor, weights: Tensor) -> Tensor:
    """Log-probs times weights; a weight of 0 leaves its token out, also where its log-prob is −inf."""
    return weights * logps.masked_fill(weights == 0, 0.0)


def _score(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool, stats: tuple[str, ...],
    **transform: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Log-probs (..., T'), which of them are scored, and the statistics asked for."""
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, labels.shape[-1])
    targets, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
    check_labels(targets, scored, logits.shape[-1])
    # Indexing with the mask, and not multiplying by it, keeps a NaN in a row that is not scored out of every gradient.
    rows = logits.reshape(*labels.shape, logits.shape[-1])[..., : targets.shape[-1], :][scored]
    kept = targets[scored].long()
    z = transform_logits(rows, **transform)
    logp = z.log_softmax(-1)
    token = logp.gather(-1, kept[:, None])[:, 0]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(scored.shape).masked_scatter(scored, values)

    return spread(token), scored, {name: spread(row_statistic(name, z, logp, kept)) for name in stats}


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
    inplace_backward: bool = False,
    process_group: Any = None,
) -> Any:
    """`fastpref.token_logprobs` in plain PyTorch; `inplace_backward` is checked and changes nothing here."""
    check_bool("inplace_backward", inplace_backward)
    logits, labels = whole_logits(logits, labels, process_group)
    check_logits(logits, labels, None)
    ignore_index = check_scoring(ignore_index, shift)
    temperature, logit_scale, softcap = check_transform(temperature, logit_scale, softcap)
    names = check_stats(stats)
    logps, _, extra = _score(
        logits, labels, None, ignore_index, shift, names,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
    return result_type(names)(logps, *extra.values()) if names else logps


def sequence_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "sum",
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    shared_lengths: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
    inplace_backward: bool = False,
    process_group: Any = None,
) -> Any:
    """`fastpref.sequence_logprobs` in plain PyTorch; `inplace_backward` is checked and changes nothing here."""
    check_bool("inplace_backward", inplace_backward)
    check_choice("reduction", reduction, REDUCTIONS[1:])
    ld_alpha = check_ld(ld_alpha, shared_lengths)
    logits, labels = whole_logits(logits, labels, process_group)
    check_logits(logits, labels, cu_seqlens)
    ignore_index = check_scoring(ignore_index, shift)
    temperature, logit_scale, softcap = check_transform(temperature, logit_scale, softcap)
    names = check_stats(stats)
    logps, scored, extra = _score(
        logits, labels, cu_seqlens, ignore_index, shift, names,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
    else:
        sequences = labels.shape[0] if labels.dim() == 2 else 1
    weighted = logps
    if ld_alpha is not None:
        weighted = weigh(logps, ld_weights(scored, cu_seqlens, sequences, ld_alpha, shared_lengths, logps.dtype))
    index = sequence_index(scored, cu_seqlens).reshape(-1)
    total = logps.new_zeros(sequences).index_add(0, index, weighted.reshape(-1))
    if reduction == "mean":
        total = total / sequence_lengths(scored, cu_seqlens, sequences).clamp(min=1)
    return result_type(names)(total, *extra.values()) if names else total

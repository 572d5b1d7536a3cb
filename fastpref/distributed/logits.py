"""Log-probs from logits with the columns split over ranks, which exchange sums for each row and no gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._core.autograd import apply, once_differentiable
from fastpref._core.sharding import Shard
from fastpref.distributed.linear import part_of, whole_sums
from fastpref.distributed.reduce import highest, second_highest
from fastpref_kernels import ops
from fastpref_kernels.contract import (
    INVALID,
    STATISTICS,
    UNSCORED,
    LinearResult,
    LogprobsResult,
    RowSums,
    Scoring,
    Statistic,
    Transform,
    constant_statistics,
    scored_targets,
    statistic_gradient,
)


class _OwnSums(NamedTuple):
    """The sums of rows over the columns of this shard, and the values of this shard that the gradient needs.

    Attributes:
        sums: (9, B, T') float64, `contract.RowSums`.
        norm: (3 or 4, B, T'), as the operator returns it, with this shard's mass at an anchor.
        own: (B, T'), the log-prob of the label, or of the nearest column here, within this shard.
        log_mass: (B, T'), the log of this shard's mass.
        top1: (B, T') bool, whether the label is this shard's first argmax.
        second: (B, T'), the second-largest z here.
    """

    sums: Tensor
    norm: Tensor
    own: Tensor
    log_mass: Tensor
    top1: Tensor
    second: Tensor


def _own_sums(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scoring: Scoring, stats: int, scored: Tensor
) -> _OwnSums:
    """Run the operator on this shard, and return the sums of rows (B, T') over its columns."""
    columns = logits.shape[-1]
    targets = labels[:, 1:] if scoring.shift else labels
    here = scored & (targets >= 0) & (targets < columns)
    planes = torch.zeros((len(RowSums._fields), *scored.shape), dtype=torch.float64, device=logits.device)
    sums = RowSums.of(planes)
    sums.anchor.fill_(-torch.inf)
    if not columns:
        norm = planes.new_zeros((3, *scored.shape), dtype=torch.promote_types(logits.dtype, torch.float32))
        return _OwnSums(planes, norm, norm[0], sums.anchor.clone(), here, sums.anchor.clone())
    found = LogprobsResult.of(
        torch.ops.fastpref.logprobs(logits, _nearest(labels, columns), cu_seqlens, None, *scoring, "none", stats)
    )
    dead = scored & (found.norm[0] == -torch.inf)  # all columns are -inf and have no mass at any anchor
    own, norm = found.logps.masked_fill(dead, -torch.inf), found.norm.masked_fill(dead, 0.0)
    # The anchor has all digits of a logit. A log-sum would lose digits of the logits above it.
    anchor = norm[0].double() * Transform.of(*scoring.transform).rate
    mass = (1 / norm[1].double()).masked_fill(dead | ~scored, 0.0)
    log_mass = mass.log()
    d = own.double() + log_mass  # z of the nearest column minus the anchor
    e = torch.where(here, d.exp(), 0.0).masked_fill(dead, 0.0)
    sums.anchor.copy_(anchor.masked_fill(dead, -torch.inf))
    sums.rest.copy_(torch.where(here & ~dead, -torch.expm1(own.double()) * mass, mass))
    sums.label.copy_(torch.where(here, (anchor + d).masked_fill(dead, -torch.inf), 0.0))
    if stats & Statistic.ENTROPY:
        whole = mass * (log_mass - found.statistic(Statistic.ENTROPY).double())
        sums.weighted.copy_((whole - (e * d).masked_fill(e == 0, 0.0)).masked_fill(dead, 0.0))
    if stats & Statistic.LOG_SUM_SQ_PROBS:
        squares = found.statistic(Statistic.LOG_SUM_SQ_PROBS).double().exp() * mass * mass
        sums.squares.copy_((squares - e * e).masked_fill(dead, 0.0))
    if stats & Statistic.MEAN_LOGITS:
        sums.total.copy_(found.statistic(Statistic.MEAN_LOGITS).double() * columns)
    second = sums.anchor
    if stats & Statistic.TOP2_MARGIN:
        margin = found.statistic(Statistic.TOP2_MARGIN).double()
        second = (sums.anchor - margin).masked_fill(dead, -torch.inf)
    planes[1:].masked_fill_(targets == INVALID, torch.nan)
    return _OwnSums(planes, norm, own, anchor + log_mass, found.statistic(Statistic.IS_TOP1), second)


class _ShardedLogprobs(torch.autograd.Function):
    """Compute log-probs (B, T') and statistics from logits whose columns are a group's shard, and their gradient.

    The operator scores each row against its label, or against the shard's nearest column if the label is on another
    rank. For its gradient it keeps this shard's mass at an anchor; its gradient is correct except at that nearest
    column.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        bounds: Tensor,
        group: Any,
        scoring: Scoring,
        stats: int,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        del inplace
        targets, scored = scored_targets(labels, cu_seqlens, ignore_index=UNSCORED, shift=scoring.shift)
        here = _own_sums(logits, labels, cu_seqlens, scoring, stats, scored)
        # The statistics that depend on the order of columns over all shards are computed separately.
        summed = stats & ~(Statistic.IS_TOP1 | Statistic.TOP2_MARGIN)
        whole = RowSums.of(whole_sums(here.sums.flatten(1), group, summed).view_as(here.sums))
        none = here.sums.new_zeros((0, *scored.shape), dtype=torch.float32)
        # With room for every position, the number of scored rows need not be known.
        wanted = (*scoring, summed, scored.numel(), None)
        result = LinearResult.of(
            torch.ops.fastpref.linear_finalize(
                logits, labels, cu_seqlens, bounds, here.sums, torch.stack(whole), none, None, *wanted
            )
        )
        statistics = dict(zip(STATISTICS.values(), result.statistics, strict=False))
        # With any statistic but "lse", the operator anchors a row at its maximum.
        best = RowSums.of(here.sums).anchor
        if stats & Statistic.IS_TOP1:
            top1 = _top1(group, best, here.top1, targets, logits.shape[-1], scored)
            statistics[Statistic.IS_TOP1] = top1 & ~result.logps.isnan()
        if stats & Statistic.TOP2_MARGIN:
            top = highest(best.clone(), group)
            margin = (
                (top - second_highest(top, best, here.second, group))
                .masked_fill(~scored, 0.0)
                .masked_fill(result.logps.isnan(), torch.nan)
            )
            statistics[Statistic.TOP2_MARGIN] = margin.to(result.logps.dtype)
        # The log of this shard's share of the row's mass, which turns the shard's softmax into that of all columns.
        anchor = whole.anchor.masked_fill(whole.anchor == -torch.inf, 0.0)
        share = here.log_mass - anchor - (whole.rest + (whole.label - anchor).exp()).log()
        share = share.masked_fill(~scored, 0.0)
        dtype = result.logps.dtype
        inverse = (here.norm[1] * share.exp()).to(dtype).clamp(min=torch.finfo(dtype).tiny)
        norm = torch.stack([here.norm[0], inverse, *result.norm[2:]])
        return result.logps, norm, here.own, share.to(dtype), *statistics.values()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, cu_seqlens, _, _, ctx.scoring, ctx.stats, ctx.inplace = inputs
        _, norm, own, share, *statistics = output
        ctx.mark_non_differentiable(norm, own, share, *constant_statistics(statistics, ctx.stats))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, cu_seqlens, norm, own, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad, _, _, _, *of_statistics = grads
        grad_entropy = statistic_gradient(of_statistics, ctx.stats)
        none = (None,) * 7
        if grad is None and grad_entropy is None:
            return (None, *none)
        logits, labels, cu_seqlens, norm, own, share = ctx.saved_tensors
        columns, shift = logits.shape[-1], ctx.scoring.shift
        if not columns:
            return (torch.zeros_like(logits), *none)
        targets, scored = scored_targets(labels, cu_seqlens, ignore_index=UNSCORED, shift=shift)
        logp = own + share
        value = torch.zeros_like(logp) if grad is None else -grad
        if grad_entropy is not None:
            value = value - grad_entropy * (logp + norm[3]).masked_fill(logp.exp() == 0, 0.0)
        # Where the label is another shard's, the operator's gradient of the nearest column is wrong.
        away = (scored & ((targets < 0) | (targets >= columns)))[..., None]
        near = _nearest(labels, columns)
        column = near[:, int(shift) :, None].clamp(min=0)
        of_column = logits[:, : scored.shape[1]].gather(-1, column)
        transform = Transform.of(*ctx.scoring.transform)
        slope = transform.derivative(transform.u(of_column.to(own.dtype)))
        value = (value * logp.exp())[..., None] * slope
        arguments = (grad, grad_entropy, logits, near, cu_seqlens, None, norm, norm.new_empty(0), *ctx.scoring, "none")
        if ctx.inplace:
            torch.ops.fastpref.logprobs_backward_(*arguments)
            torch.autograd.graph.increment_version(logits)
            d_logits = logits.detach()
        else:
            d_logits = torch.ops.fastpref.logprobs_backward(*arguments)
        rows = d_logits[:, : scored.shape[1]]
        rows.scatter_(-1, column, torch.where(away, value.to(d_logits.dtype), rows.gather(-1, column)))
        return (d_logits, *none)


def sharded_logprobs(
    shard: Shard,
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    scoring: Scoring,
    stats: int,
    inplace: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return log-probs (B, T') and the statistics of `token_logprobs`, from logits that are a shard.

    Args:
        shard: this rank's shard.
        logits: (B, T, V/P).
        labels: (B, T).
        cu_seqlens: None, or the packed boundaries (S+1,).
        scoring: which labels are scored, on which transform of the logits.
        stats: the bits of the statistics that are asked for.
        inplace: whether the gradient is written over the logits.
    """
    part = part_of(shard, labels, cu_seqlens, logits.shape[-1], scoring, ops.on_host(labels))
    given = (logits, part.labels, cu_seqlens, part.bounds, part.group, part.scoring, stats, inplace)
    logps, _, _, _, *statistics = apply(_ShardedLogprobs, *given)
    return logps, statistics


def _nearest(labels: Tensor, columns: int) -> Tensor:
    """Return the labels of a shard, with those outside of it moved to its first or last column."""
    return labels.clamp(0, columns - 1).masked_fill(labels == UNSCORED, UNSCORED)


def _top1(group: Any, top: Tensor, top1: Tensor, targets: Tensor, columns: int, scored: Tensor) -> Tensor:
    """Return whether each label is the first argmax over all shards, from this shard's maxima and answers."""
    before, after = targets >= columns, targets < 0  # of these columns, where the label is another shard's
    first = scored & ~before & ~after & top1
    own = torch.where(scored & ~before & ~after & ~top1, torch.inf, -torch.inf)  # something here is above the label
    maxima = torch.stack(
        [torch.where(before, top, own), torch.where(after, top, -torch.inf), torch.where(first, top, -torch.inf)]
    )
    below, above, label = highest(maxima, group)
    return (below < label) & (above <= label) & scored

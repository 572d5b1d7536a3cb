"""Log-probs over a vocabulary that is split over ranks: each folds its own columns, and only sums of rows travel.

A rank's sums of a row are of exponentials at an anchor of its own. One all-reduce finds the highest anchor of each row,
and a second adds up the sums, brought to it: 8 bytes and 16 bytes a row, and more for each statistic. The rows are
those that are scored; from logits, whose scored rows nobody has counted, they are all.
The gradient of the head's shard is made from what is here. That of the hidden states is one all-reduce of scored rows
more, in float32. Logits that are split so need none: their gradient is of what is here.

Every rank gives the same hidden states and labels, makes the same loss of the log-probs it gets, and so calls the
backward with the same gradient: what Megatron-LM's tensor parallelism (arXiv 1909.08053) asks of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref._checks import FLOATING, check_tensor
from fastpref._function import apply, has_values, once_differentiable
from fastpref._sharding import Shard, resolve_group
from fastpref.reference.logprobs import scored_targets
from fastpref_kernels import ops

UNSCORED = ops.UNSCORED
_ENTROPY, _MEAN, _TOP1, _LOG_SUM_SQ, _DROPPED = 2, 4, 8, 16, 32


def of_shard(
    shard: Shard | None, labels: Tensor, cu_seqlens: Tensor | None, columns: int, ignore_index: int, shift: bool,
    checks: bool = True,
) -> tuple[Any, Tensor | None, Tensor, int]:  # fmt: skip
    """Return the group and bounds that a Function is given, None for a whole vocabulary, its labels and ignore_index.

    A shard's labels (B, T) are its columns; -1 or past its end where they are another's, `UNSCORED` where none is. With
    `checks`, labels outside of the vocabulary raise, for which the host waits.
    """
    if shard is None:
        return None, None, labels, ignore_index
    here = torch.ops.fastpref.shard_labels(labels, cu_seqlens, shard.bounds, columns, ignore_index, shift, checks)
    return shard.group, shard.bounds, here, UNSCORED


def _all_reduce(values: Tensor, group: Any, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    values = values.contiguous()
    dist.all_reduce(values, operation, group=group)
    return values


def _whole_sums(sums: Tensor, group: Any, stats: int) -> Tensor:
    """Sums of rows over all columns, at the highest anchor, from those (8, R) over each rank's columns."""
    anchor, rest, weighted, squares, total, before, after, label = sums
    maxima = torch.stack([anchor, before, after] if stats & _TOP1 else [anchor])
    highest, *sides = _all_reduce(maxima, group, dist.ReduceOp.MAX)
    empty = anchor == -torch.inf
    gap = torch.where(empty, 0.0, anchor - highest)
    factor = torch.where(empty, 0.0, gap.exp())
    gap = gap.masked_fill(factor == 0, 0.0)
    planes = {1: rest * factor, 7: label}
    if stats & _ENTROPY:
        planes[2] = factor * (weighted + gap * rest)
    if stats & _LOG_SUM_SQ:
        planes[3] = factor * factor * squares
    if stats & _MEAN:
        planes[4] = total
    found = dict(zip(planes, _all_reduce(torch.stack(list(planes.values())), group), strict=True))
    found |= {0: highest, **dict(zip((5, 6), sides, strict=False))}
    return torch.stack([found.get(i, torch.zeros_like(rest)) for i in range(8)])


def _scored_rows(labels: Tensor, cu_seqlens: Tensor | None, shift: bool, rows: int | None) -> ops.Rows | None:
    """Return the scored rows of a shard's labels; None in a graph that does not know their number."""
    if rows is None and not has_values(labels):
        return None
    return ops.Rows.of(labels, cu_seqlens, UNSCORED, shift, rows)


def _reduced(planes: Tensor, rows: ops.Rows | None, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `reduce`, (n, R) -> (n, R), of planes (n, B, T'): of the scored rows alone where they are known."""
    if rows is None:
        return reduce(planes.flatten(1)).view_as(planes)
    return rows.spread(reduce(rows.take(planes, slice(None))), planes.dtype)


def linear_logprobs(group: Any, bounds: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Run the operator `linear_logprobs`, or its parts where the weight is a group's shard, and labels are its."""
    if group is None:
        return torch.ops.fastpref.linear_logprobs(*arguments)
    hidden, _, _, labels, cu_seqlens, store, *scoring, stats, rows, _, filter_eps = arguments
    sums, masses = torch.ops.fastpref.linear_fold(*arguments)
    found = _scored_rows(labels, cu_seqlens, scoring[1], rows)
    whole = _reduced(sums, found, lambda sums: _whole_sums(sums, group, stats))
    *results, dropped = torch.ops.fastpref.linear_finalize(
        hidden, labels, cu_seqlens, bounds, sums, whole, masses, store, *scoring, stats, rows, filter_eps
    )
    if stats & _DROPPED:
        dropped = _reduced(dropped[None], found, lambda dropped: _all_reduce(dropped, group))[0]
    return *results, dropped


def reduce_hidden(
    group: Any, d_hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool, rows: int | None
) -> Tensor:
    """Return the gradient of the hidden states (B, T, H), summed over the group.

    Only scored rows travel, because the rest is 0; in a graph that does not know their number, all do.
    """
    found = _scored_rows(labels, cu_seqlens, shift, rows)
    if found is None:
        return _all_reduce(d_hidden, group)
    if len(found):
        flat = d_hidden.flatten(0, 1)
        source = found.source.clamp(max=len(flat) - 1)
        summed = _all_reduce(flat.index_select(0, source), group)
        summed.masked_fill_((found.source >= len(flat))[:, None], 0.0)  # rows that are left over
        flat.zero_().index_add_(0, source, summed)
    return d_hidden


class _SummedParts(torch.autograd.Function):
    @staticmethod
    def forward(part: Tensor, group: Any) -> Tensor:
        return _all_reduce(part.clone(), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grads[0], None


def sum_parts(parts: Tensor, process_group: Any) -> Tensor:
    """The sum over ranks of what each has scored of the same sequences, for sequence and context parallelism.

    Each rank holds some of every sequence's tokens and scores them with labels that were shifted before they were cut,
    `shift=False`; `sequence_logprobs(..., reduction="sum")` of all ranks' parts add up to the sequence's. Every rank
    then makes the same loss of the sums, and gets the gradient of its own tokens: those of the weights are to be added
    up over the ranks, as a data-parallel wrapper does when told to add and not to average.

    Args:
        parts: (B,) or (S,), differentiable.
        process_group: the ranks, or a one-dimensional device mesh.

    Returns:
        The sum, of the same shape, on every rank.

    Raises:
        TypeError: `parts` is no floating-point tensor; `process_group` is neither.
        ValueError: a mesh of more dimensions; this rank is not of the group.
    """
    check_tensor("parts", parts, FLOATING, "a floating-point tensor (B,) or (S,)")
    return _SummedParts.apply(parts, resolve_group(process_group))  # type: ignore[return-value]


class _ShardedLogprobs(torch.autograd.Function):
    """Log-probs (B, T') and statistics from logits whose columns are a group's shard, and the gradient of these.

    The operator scores each row against its label, or against the shard's nearest column where the label is another's.
    What it keeps for its gradient is this shard's mass at an anchor; its gradient is right but for that column.
    """

    @staticmethod
    def forward(
        logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, bounds: Tensor, group: Any, scoring: tuple[Any, ...],
        stats: int, inplace: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        del inplace
        _, shift, scale, temperature, softcap = scoring
        columns = logits.shape[-1]
        targets, scored = scored_targets(labels, cu_seqlens, ignore_index=UNSCORED, shift=shift)
        here = scored & (targets >= 0) & (targets < columns)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = torch.zeros((8, *scored.shape), dtype=torch.float64, device=logits.device)
        sums[0] = -torch.inf
        norm = sums.new_zeros((3, *scored.shape), dtype=dtype)
        own, top1, log_own = norm[0], here, sums[0]  # log_own: log of this shard's mass
        if columns:
            own, _, norm, _, _, entropy, mean, top1, squares = torch.ops.fastpref.logprobs(
                logits, _nearest(labels, columns), cu_seqlens, None, *scoring, "none", stats
            )
            dead = scored & (norm[0] == -torch.inf)  # columns of nothing but -inf, which have no mass at any anchor
            own, norm = own.masked_fill(dead, -torch.inf), norm.masked_fill(dead, 0.0)
            # The anchor has all digits of a logit, where a log-sum would lose those of what is above it.
            anchor = norm[0].double() * (scale / temperature if softcap is None else 1 / temperature)
            mass = (1 / norm[1].double()).masked_fill(dead | ~scored, 0.0)
            log_mass = mass.log()
            log_own = anchor + log_mass
            d = own.double() + log_mass  # of the nearest column, from the anchor
            e = torch.where(here, d.exp(), 0.0).masked_fill(dead, 0.0)
            sums[0] = anchor.masked_fill(dead, -torch.inf)
            sums[1] = torch.where(here & ~dead, -torch.expm1(own.double()) * mass, mass)
            sums[7] = torch.where(here, (anchor + d).masked_fill(dead, -torch.inf), 0.0)
            if stats & _ENTROPY:
                whole = mass * (log_mass - entropy.double())
                sums[2] = (whole - (e * d).masked_fill(e == 0, 0.0)).masked_fill(dead, 0.0)
            if stats & _LOG_SUM_SQ:
                sums[3] = (squares.double().exp() * mass * mass - e * e).masked_fill(dead, 0.0)
            if stats & _MEAN:
                sums[4] = mean.double() * columns
        sums[1:].masked_fill_(targets == ops.INVALID, torch.nan)
        whole = _reduced(sums, None, lambda sums: _whole_sums(sums, group, stats & ~_TOP1))
        none = sums.new_zeros((0, *scored.shape), dtype=torch.float32)
        # With room for every position, nobody has to know how many are scored.
        logps, whole_norm, _, *statistics, _ = torch.ops.fastpref.linear_finalize(
            logits, labels, cu_seqlens, bounds, sums, whole, none, None, *scoring, stats & ~_TOP1, scored.numel(), None
        )
        if stats & _TOP1:
            # With any statistic but "lse", what the operator anchors a row at is its maximum.
            statistics[3] = _top1(group, sums[0], top1, targets, columns, scored) & ~logps.isnan()
        # log of this shard's share of the row's mass, which turns its softmax into the whole one.
        highest = whole[0].masked_fill(whole[0] == -torch.inf, 0.0)
        share = log_own - highest - (whole[1] + (whole[7] - highest).exp()).log()
        share = share.masked_fill(~scored, 0.0)
        inverse = (norm[1] * share.exp()).to(dtype).clamp(min=torch.finfo(dtype).tiny)
        norm = torch.stack([norm[0], inverse, *whole_norm[2:]])
        return logps, norm, own, share.to(dtype), *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, cu_seqlens, _, _, ctx.scoring, stats, ctx.inplace = inputs
        _, norm, own, share, lse, entropy, *others = output
        ctx.with_entropy = bool(stats & _ENTROPY)
        constant = [norm, own, share, lse, *others]
        ctx.mark_non_differentiable(*(constant if ctx.with_entropy else [*constant, entropy]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, cu_seqlens, norm, own, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad, grad_entropy = grads[0], grads[5] if ctx.with_entropy else None
        none = (None,) * 7
        if grad is None and grad_entropy is None:
            return (None, *none)
        logits, labels, cu_seqlens, norm, own, share = ctx.saved_tensors
        columns, shift = logits.shape[-1], ctx.scoring[1]
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
        value = (value * logp.exp())[..., None] * _slope(of_column.to(own.dtype), *ctx.scoring[2:])
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
    shard: Shard, logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scoring: tuple[Any, ...], stats: int,
    inplace: bool,
) -> list[Tensor]:  # fmt: skip
    """Log-probs (B, T') and the statistics of `token_logprobs`, from logits that are a shard.

    `scoring` is the operator's but its reduction; `inplace` writes the gradient over the logits.
    """
    ignore_index, shift, *transform = scoring
    group, bounds, labels, ignore_index = of_shard(
        shard, labels, cu_seqlens, logits.shape[-1], ignore_index, shift, checks=ops.on_host(labels)
    )
    logps, _, _, _, *statistics = apply(
        _ShardedLogprobs, logits, labels, cu_seqlens, bounds, group, (ignore_index, shift, *transform), stats, inplace
    )
    return [logps, *statistics]


def _nearest(labels: Tensor, columns: int) -> Tensor:
    """Labels of a shard, those outside of it moved to its first or last column."""
    return labels.clamp(0, columns - 1).masked_fill(labels == UNSCORED, UNSCORED)


def _top1(group: Any, top: Tensor, top1: Tensor, targets: Tensor, columns: int, scored: Tensor) -> Tensor:
    """Whether each label is the first argmax of all shards' columns, from this one's maxima and its own answers."""
    before, after = targets >= columns, targets < 0  # of these columns, where the label is another shard's
    first = scored & ~before & ~after & top1
    own = torch.where(scored & ~before & ~after & ~top1, torch.inf, -torch.inf)  # something here is above the label
    maxima = torch.stack(
        [torch.where(before, top, own), torch.where(after, top, -torch.inf), torch.where(first, top, -torch.inf)]
    )
    below, above, label = _all_reduce(maxima, group, dist.ReduceOp.MAX)
    return (below < label) & (above <= label) & scored


def _slope(x: Tensor, scale: float, temperature: float, softcap: float | None) -> Tensor | float:
    """dz/dx."""
    slope = scale / temperature
    return slope if softcap is None else slope * (1 - torch.tanh(x * (scale / softcap)) ** 2)

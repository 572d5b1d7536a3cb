"""Log-probs from hidden states with the vocabulary split over ranks, which exchange only sums for each row.

Each rank sums over its own columns, relative to an anchor of its own for each row. One all-reduce finds the highest
anchor of each row. A second all-reduce adds up the sums after rescaling them to that anchor. These send 8 bytes and 16
bytes per row, and more for each statistic. Only scored rows are sent. Each rank computes the gradient of its shard of
the head from local values. The gradient of the hidden states takes one more all-reduce of scored rows, in float32.

Every rank must pass the same hidden states and labels, and compute the same loss from the log-probs, so that its
backward gets the same gradient. Megatron-LM's tensor parallelism (arXiv 1909.08053) requires the same of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._core.autograd import has_values
from fastpref._core.options import replaced
from fastpref._core.sharding import Shard
from fastpref.distributed.reduce import all_reduce, highest, second_highest
from fastpref_kernels import ops
from fastpref_kernels.contract import UNSCORED, LinearResult, RowSums, Scoring, Statistic


class Part(NamedTuple):
    """The part of a vocabulary that is passed to an operator.

    Attributes:
        group: the ranks that hold the parts; None where this rank holds the whole vocabulary.
        bounds: int64 (2,), the first column here and the number of all columns, or None.
        labels: (B, T). With a group, columns of this part: −1 or past its end if they are on another rank, and
            `UNSCORED` if they are not scored.
        scoring: with a group, its `ignore_index` is `UNSCORED`.
    """

    group: Any
    bounds: Tensor | None
    labels: Tensor
    scoring: Scoring


def part_of(
    shard: Shard | None, labels: Tensor, cu_seqlens: Tensor | None, columns: int, scoring: Scoring, checks: bool
) -> Part:
    """Return this rank's part of a vocabulary, and the labels in its columns.

    Args:
        shard: this rank's shard; None for the whole vocabulary.
        labels: (B, T).
        cu_seqlens: None, or the packed boundaries (S+1,).
        columns: the number of columns here.
        scoring: which labels are scored.
        checks: whether labels outside of the vocabulary raise an error, for which the host waits.
    """
    if shard is None:
        return Part(None, None, labels, scoring)
    ignore_index, shift = scoring.ignore_index, scoring.shift
    here = torch.ops.fastpref.shard_labels(labels, cu_seqlens, shard.bounds, columns, ignore_index, shift, checks)
    return Part(shard.group, shard.bounds, here, replaced(scoring, ignore_index=UNSCORED))


def whole_sums(sums: Tensor, group: Any, stats: int) -> Tensor:
    """Return the sums of rows over all columns (9, R), at the highest anchor, from each rank's sums."""
    own = RowSums.of(sums)
    ranked = bool(stats & (Statistic.IS_TOP1 | Statistic.TOP2_MARGIN))
    maxima = torch.stack([own.anchor, own.before, own.after] if ranked else [own.anchor])
    anchor, *sides = highest(maxima, group)
    empty = own.anchor == -torch.inf
    gap = torch.where(empty, 0.0, own.anchor - anchor)
    factor = torch.where(empty, 0.0, gap.exp())
    gap = gap.masked_fill(factor == 0, 0.0)
    added = {"rest": own.rest * factor, "label": own.label}
    if stats & Statistic.ENTROPY:
        added["weighted"] = factor * (own.weighted + gap * own.rest)
    if stats & Statistic.LOG_SUM_SQ_PROBS:
        added["squares"] = factor * factor * own.squares
    if stats & Statistic.MEAN_LOGITS:
        added["total"] = own.total
    found = dict(zip(added, all_reduce(torch.stack(list(added.values())), group), strict=True))
    found["anchor"] = anchor
    found |= dict(zip(("before", "after"), sides, strict=False))
    if stats & Statistic.TOP2_MARGIN:
        top, best = torch.maximum(*sides), torch.maximum(own.before, own.after)
        second = second_highest(top, best, own.second, group)
        found["second"] = second.masked_fill(found["rest"].isnan(), torch.nan)
    nothing = torch.zeros_like(own.rest)
    return torch.stack([found.get(name, nothing) for name in RowSums._fields])


def _scored_rows(labels: Tensor, cu_seqlens: Tensor | None, shift: bool, rows: int | None) -> ops.Rows | None:
    """Return the scored rows of a shard's labels; None in a graph that does not know their number."""
    if rows is None and not has_values(labels):
        return None
    return ops.Rows.of(labels, cu_seqlens, UNSCORED, shift, rows)


def _reduced(planes: Tensor, rows: ops.Rows | None, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `reduce`, (n, R) -> (n, R), to planes (n, B, T'): only to the scored rows if they are known."""
    if rows is None:
        return reduce(planes.flatten(1)).view_as(planes)
    return rows.spread(reduce(rows.take(planes, slice(None))), planes.dtype)


Chunking = tuple[int | None, int | None, float | None]
"""The arguments rows, chunk_rows and filter_eps of an operator."""


def linear_logprobs(
    part: Part,
    operands: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    store: Tensor | None,
    stats: int,
    chunking: Chunking,
) -> LinearResult:
    """Run `fastpref::linear_logprobs`, or the operators of its parts if the weight is a group's shard.

    Args:
        part: the part of the vocabulary, with the labels.
        operands: hidden (B, T, H), weight (V, H), and bias (V,) or None.
        cu_seqlens: None, or the packed boundaries (S+1,).
        store: memory for the exponentials to keep, or None.
        stats: the bits of the statistics that are asked for.
        chunking: the operator's rows, chunk_rows and filter_eps.
    """
    group, bounds, labels, scoring = part
    arguments = (*operands, labels, cu_seqlens, store, *scoring, stats, *chunking)
    if group is None:
        return LinearResult.of(torch.ops.fastpref.linear_logprobs(*arguments))
    sums, masses = torch.ops.fastpref.linear_fold(*arguments)
    rows, _, filter_eps = chunking
    found = _scored_rows(labels, cu_seqlens, scoring.shift, rows)
    whole = _reduced(sums, found, lambda sums: whole_sums(sums, group, stats))
    given = (operands[0], labels, cu_seqlens, bounds, sums, whole, masses, store)
    result = LinearResult.of(torch.ops.fastpref.linear_finalize(*given, *scoring, stats, rows, filter_eps))
    if not stats & Statistic.DROPPED_MASS:
        return result
    *others, dropped = result.statistics
    dropped = _reduced(dropped[None], found, lambda dropped: all_reduce(dropped, group))[0]
    return replaced(result, statistics=(*others, dropped))


def reduce_hidden(
    group: Any, d_hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool, rows: int | None
) -> Tensor:
    """Return the gradient of the hidden states (B, T, H), summed over the group.

    Only scored rows are sent, because the rest is 0. A graph that does not know their number sends all rows.
    """
    found = _scored_rows(labels, cu_seqlens, shift, rows)
    if found is None:
        return all_reduce(d_hidden, group)
    if len(found):
        flat = d_hidden.flatten(0, 1)
        source = found.source.clamp(max=len(flat) - 1)
        summed = all_reduce(flat.index_select(0, source), group)
        summed.masked_fill_((found.source >= len(flat))[:, None], 0.0)  # rows that are left over
        flat.zero_().index_add_(0, source, summed)
    return d_hidden

"""Compute a loss of groups of sequences from hidden states, with the gradients computed in the forward.

A chunk holds whole groups (pairs, or the K answers to a prompt). Once a chunk's log-probs are known, the gradient of
the loss with respect to them is known too. Both gradient products then run at once on the exponentials just computed.
That makes three products in all, the minimum, and no tensor of N × V numbers outlives its chunk. If a batch is a single
chunk, its exponentials are kept for the backward instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._core.autograd import apply, once_differentiable, transformed, wants_gradient
from fastpref._core.groups import LossFunction, check_constant, check_losses
from fastpref._core.options import Reduction, replaced
from fastpref._core.resolve import LinearBatch, statistic_bits
from fastpref._core.runs import Plan, make_plan
from fastpref._core.sequences import (
    count_sequences,
    ld_weights,
    reduce_sequences,
    sequence_index,
    sequence_lengths,
    weigh,
)
from fastpref._core.sharding import Shard
from fastpref.distributed import linear as distributed
from fastpref.linear_logprobs import cast, empty, exponentials, score
from fastpref.reference.losses.reduction import reduce
from fastpref_kernels import ops
from fastpref_kernels.contract import Scoring, scored_targets


class Groups(NamedTuple):
    """How the sequences of a batch are grouped, and how their losses are reduced.

    Attributes:
        size: K, the number of sequences in a group: sequence k·G + g is member k of group g.
        over: how tokens are reduced to sequences.
        reduction: how the groups' losses are reduced: "mean", "sum" or "none".
        mixes: whether a group's loss depends on other groups.
    """

    size: int
    over: Reduction
    reduction: str
    mixes: bool = False


class _Call(NamedTuple):
    """The options of one call of `_GradientsInForward`.

    Attributes:
        scoring: which labels are scored, on which transform of the logits.
        dtype: the dtype in which the operands are multiplied.
        stats: the bits of the statistics that are asked for.
        filter_eps: the softmax mass below which columns are left out of the gradient, or None.
        needed: whether the gradients of hidden, weight and bias are needed.
        group_size: K.
        plan: the runs of groups.
        mean: whether the losses are averaged; otherwise they are added.
        told: the number of rows that operators are told, or None.
    """

    scoring: Scoring
    dtype: torch.dtype
    stats: int
    filter_eps: float | None
    needed: tuple[bool, ...]
    group_size: int
    plan: Plan
    mean: bool
    told: int | None


def _merged(statistics: list[Tensor], of_chunk: list[Tensor]) -> list[Tensor]:
    """Merge the statistics of two sets of positions: each set's values are 0 or False at the other's positions."""
    if not statistics:
        return of_chunk
    pairs = zip(statistics, of_chunk, strict=True)
    return [held | new if held.dtype == torch.bool else held + new for held, new in pairs]


def _loss_gradient(loss_fn: LossFunction, members: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Return the gradient of Σ losses[begin:end] with respect to log-probs (G, K), and all losses (G,), detached."""

    def chunk_loss(members: Tensor) -> tuple[Tensor, Tensor]:
        losses = loss_fn(members)
        check_losses(losses, members.shape[0])
        return losses[begin:end].sum(), losses

    if torch.compiler.is_compiling():
        gradient, (_, losses) = torch.func.grad_and_value(chunk_loss, has_aux=True)(members)
        return gradient, losses.detach()
    # torch.func refuses to run under the saved-tensor hooks of checkpointing and offloading, so this does not use it.
    # The hooks are for tensors that a backward needs later; these few numbers are freed before that.
    leaf = members.detach().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        total, losses = chunk_loss(leaf)
        check_constant(losses, leaf)
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(leaf) if gradient is None else gradient, losses.detach()


class _GradientsInForward(torch.autograd.Function):
    """Compute a loss of groups and its gradients; the backward only multiplies these by the upstream gradient."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        bounds: Tensor | None,
        token_weights: Tensor,
        group: Any,
        loss_fn: LossFunction,
        call: _Call,
    ) -> tuple[Tensor, ...]:
        scoring, dtype, stats, filter_eps, needed, group_size, plan, mean, told = call
        operands = cast(dtype, hidden, weight, bias)
        wide = torch.promote_types(dtype, torch.float32)
        totals = [
            empty(tensor, tensor.shape, wide) if want and tensor is not None else None
            for tensor, want in zip((hidden, weight, bias), needed, strict=True)
        ]
        sequences = count_sequences(labels, cu_seqlens)
        groups = sequences // group_size
        ignore_index, shift = scoring.ignore_index, scoring.shift
        targets, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
        index = sequence_index(scored, cu_seqlens)
        store = exponentials(hidden, plan.room, weight.shape[0], dtype)
        logps = hidden.new_zeros(sequences, dtype=wide)
        loss = hidden.new_zeros((), dtype=wide)
        scale = 1 / max(groups, 1) if mean else 1.0
        statistics: list[Tensor] = []
        for number, (begin, end, run_rows) in enumerate(plan.runs):
            chunking = (None if told is None else run_rows, None, filter_eps)
            of_position = index % groups
            inside = (of_position >= begin) & (of_position < end)
            chunk = labels.clone()
            chunk[:, int(shift) :] = targets.masked_fill(~inside, ignore_index)
            part = distributed.Part(group, bounds, chunk, scoring)
            result = distributed.linear_logprobs(part, operands, cu_seqlens, store, stats, chunking)
            statistics = _merged(statistics, list(result.statistics))
            made = reduce_sequences(weigh(result.logps, token_weights), scored, cu_seqlens, Reduction("sum"))
            logps = logps + made

            # The groups of other chunks are passed as zeros, so that the loss may hold data of its own for every group.
            gradient, losses = _loss_gradient(loss_fn, made.view(group_size, groups).T, begin, end)
            loss = loss + losses[begin:end].sum().to(wide)
            by_group = torch.arange(groups, device=made.device)
            of_groups = ((by_group >= begin) & (by_group < end))[:, None]
            by_sequence = torch.where(of_groups, gradient * scale, 0.0).T.reshape(-1)
            upstream = (by_sequence[index] * token_weights, None)
            kept = (result.norm, store, result.shares)
            torch.ops.fastpref.linear_logprobs_backward_(
                *upstream, *operands, chunk, cu_seqlens, *kept, *totals, number == 0, *scoring, *chunking
            )
        if group is not None and totals[0] is not None:
            # `told` may be smaller than the sum of the rows that were counted for the runs.
            of_runs = [run.rows for run in plan.runs if run.rows is not None]
            rows = sum(of_runs) if told is not None and len(of_runs) == len(plan.runs) else told
            distributed.reduce_hidden(group, totals[0], labels, cu_seqlens, shift, rows)
        gradients = [loss.new_empty(0) if total is None else total for total in totals]
        return loss * scale, logps, *gradients, *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in inputs[:3])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or every backward would make zeros of each gradient's size
        ctx.save_for_backward(*output[2:5])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        none = (None,) * (len(ctx.needs_input_grad) - 3)
        grad_loss, *_ = grads
        triples = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        # The gradient is rounded to the parameter's dtype last, and never overwrites what a second backward may need.
        return *(
            torch.ops.fastpref.scaled_gradient(saved, grad_loss, dtype) if needed else None
            for saved, dtype, needed in triples
        ), *none


def _most_columns(weight: Tensor, shard: Shard | None) -> int | None:
    """Return the most columns of any rank; None if the host would have to wait for a device to know the number."""
    if shard is None:
        return weight.shape[0]
    if isinstance(shard.largest, int) or ops.on_host(weight):
        return int(shard.largest)
    return None


def _token_weights(batch: LinearBatch, over: Reduction) -> Tensor:
    """Return the weight of each token (B, T') in the log-prob of its sequence."""
    scored, cu_seqlens, wide = batch.scored, batch.cu_seqlens, batch.wide()
    weights = scored.to(wide)
    if over.ld_alpha is not None:
        weights = weights * ld_weights(scored, cu_seqlens, batch.sequences(), over, wide)
    if over.name == "mean":
        lengths = sequence_lengths(scored, cu_seqlens, batch.sequences()).clamp(min=1)
        weights = weights / lengths[sequence_index(scored, cu_seqlens)]
    return weights


def _runs_of(batch: LinearBatch, groups: Groups) -> Plan | None:
    """Return the runs of groups whose gradients are computed in the forward; None to compute them in the backward."""
    mode, chunk_rows, _ = batch.options
    shard = batch.shard
    # float16 lacks the range for exponentials, and for a gradient that GradScaler's factor has not scaled yet.
    # torch.func does not allow the small backward within a forward.
    apart = mode == "auto" and groups.reduction != "none" and not groups.mixes
    if not apart or batch.dtype == torch.float16 or transformed():
        return None
    # In a graph, the ranks of a group cannot agree on a number of rows, unless DTensors or the caller determine it.
    agreed = shard is None or chunk_rows or isinstance(shard.largest, int) or not torch.compiler.is_compiling()
    if not agreed or not wants_gradient(batch.hidden, batch.weight, batch.bias):
        return None
    limit = chunk_rows or ops.loss_chunk_rows(batch.weight, _most_columns(batch.weight, shard), batch.dtype)
    return make_plan(batch, groups.size, limit)


def group_loss(batch: LinearBatch, loss_fn: LossFunction, groups: Groups) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the loss, the sequences' log-probs (S,), detached, and the operator's statistics, detached.

    Args:
        batch: the batch, with its rows counted.
        loss_fn: (G, K) log-probs -> (G,) losses.
        groups: the groups.
    """
    plan, sequences = _runs_of(batch, groups), batch.sequences()
    if plan is None or len(plan.runs) <= 1:
        mode = batch.options.mode
        if mode == "auto":
            # With one chunk, the backward can use the exponentials: its products then need no float32 buffer.
            mode = "recompute" if plan is None else "save"
        logps, statistics = score(replaced(batch, options=replaced(batch.options, mode=mode)), groups.over)
        members = logps.view(groups.size, sequences // groups.size).T
        losses = loss_fn(members)
        check_losses(losses, sequences // groups.size)
        if not torch.compiler.is_compiling():
            check_constant(losses, members)
        return reduce(losses, groups.reduction), logps.detach(), [values.detach() for values in statistics]
    hidden, weight, bias, labels, _, cu_seqlens, *_ = batch
    told = batch.rows.told
    part = distributed.part_of(batch.shard, labels, cu_seqlens, weight.shape[0], batch.scoring, told is None)
    call = _Call(
        scoring=part.scoring,
        dtype=batch.dtype,
        stats=statistic_bits(batch.stats),
        filter_eps=batch.options.filter_eps,
        needed=tuple(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)),
        group_size=groups.size,
        plan=plan,
        mean=groups.reduction == "mean",
        told=told,
    )
    tensors = (hidden, weight, bias, part.labels, cu_seqlens, part.bounds, _token_weights(batch, groups.over))
    loss, logps, _, _, _, *statistics = apply(_GradientsInForward, *tensors, part.group, loss_fn, call)
    return loss, logps, statistics

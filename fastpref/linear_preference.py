"""Preference losses from hidden states, with the gradients made in the forward.

A chunk holds whole groups (pairs, or the K answers to a prompt). Once its log-probs are known, so is the loss's
gradient by them, and both gradient products follow at once on the exponentials just made: three products in all, the
fewest there can be, and nothing of N × V outlives its chunk. A batch that is one chunk keeps them for its backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import distributed
from fastpref._checks import (
    REDUCTIONS,
    check_bool,
    check_choice,
    check_ld,
    check_linear,
    check_mode,
    check_scoring,
    check_transform,
)
from fastpref._function import apply, enter, has_values, once_differentiable, transformed, wants_gradient
from fastpref._results import LINEAR_STATISTICS, check_stats, linear_group_type, linear_loss_type
from fastpref._rows import ScoredRows, count_columns, resolve_rows, smaller
from fastpref._sharding import Shard, resolve_head
from fastpref.linear_logprobs import (
    cast,
    compute_dtype,
    empty,
    exponentials,
    linear_logprobs,
    reduce_sequences,
)
from fastpref.losses.preference import dpo_loss
from fastpref.reference.linear_preference import (
    LossFunction,
    check_constant,
    check_group,
    check_halves,
    check_losses,
    check_references,
    resolve_options,
)
from fastpref.reference.logprobs import (
    count_sequences,
    ld_weights,
    scored_targets,
    sequence_index,
    sequence_lengths,
    weigh,
)
from fastpref.reference.losses.preference import reduce
from fastpref_kernels import ops


class _Run(NamedTuple):
    """Groups whose exponentials are kept together: those in [begin, end), and their scored rows.

    `rows` is None where a graph does not know it.
    """

    begin: int
    end: int
    rows: int | None


def _runs(rows: list[int], limit: int) -> list[_Run]:
    """Return the fewest runs of groups that have at most `limit` rows each; no group has more."""
    runs: list[_Run] = []
    begin, held = 0, 0
    for group, count in enumerate(rows):
        if held + count > limit:
            runs.append(_Run(begin, group, held))
            begin, held = group, 0
        held += count
    return [*runs, _Run(begin, len(rows), held)] if rows else []


def _even_runs(rows: list[int], limit: int) -> list[_Run]:
    """Return as few runs as `_runs` with the least limit that gives so few: the last is no remainder of a few rows."""
    runs = _runs(rows, limit)
    least = max(rows, default=0)
    while least < limit:
        middle = (least + limit) // 2
        if len(_runs(rows, middle)) == len(runs):
            limit = middle
        else:
            least = middle + 1
    return _runs(rows, limit)


def _plan(
    known: ScoredRows, scored: Tensor, cu_seqlens: Tensor | None, sequences: int, group_size: int, limit: int
) -> tuple[list[_Run], int] | None:
    """Return runs of groups of at most `limit` scored rows, and the rows to make room for; None where one has more."""
    groups = sequences // group_size
    if known.of_sequences is None and not has_values(scored):
        if groups and known.total is not None and known.total <= limit:
            return [_Run(0, groups, known.total)], known.total
        # Shapes are known and no values: every position counts, and packed sequences cannot be told apart.
        if cu_seqlens is not None:
            return ([_Run(0, groups, None)], scored.numel()) if scored.numel() <= limit else None
        rows = group_size * scored.shape[1]
        if rows > limit:
            return None
        runs = _runs([rows] * groups, limit)
        room = max([0, *((run.end - run.begin) * rows for run in runs)])
        return [_Run(run.begin, run.end, None) for run in runs], room
    if groups and known.total is not None and known.total <= limit:
        return [_Run(0, groups, known.total)], known.total
    of_sequences = known.by_sequence(scored, cu_seqlens, sequences)
    of_groups = [sum(of_sequences[group::groups]) for group in range(groups)]
    if max(of_groups, default=0) > limit:
        return None
    runs = _even_runs(of_groups, limit)
    return runs, max((run.rows or 0 for run in runs), default=0)


def _merged(statistics: list[Tensor], of_chunk: list[Tensor]) -> list[Tensor]:
    """Statistics of disjoint positions, 0 or False wherever a chunk has none."""
    if not statistics:
        return of_chunk
    pairs = zip(statistics, of_chunk, strict=True)
    return [held | new if held.dtype == torch.bool else held + new for held, new in pairs]


def _loss_gradient(loss_fn: LossFunction, members: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """The gradient of Σ losses[begin:end] by log-probs (G, K), and all losses (G,), both detached."""

    def chunk_loss(members: Tensor) -> tuple[Tensor, Tensor]:
        losses = loss_fn(members)
        check_losses(losses, members.shape[0])
        return losses[begin:end].sum(), losses

    if torch.compiler.is_compiling():
        gradient, (_, losses) = torch.func.grad_and_value(chunk_loss, has_aux=True)(members)
        return gradient, losses.detach()
    # Not torch.func: it refuses to run under the hooks of checkpointing and offloading, which are for what a backward
    # will need, and these few numbers are gone before.
    leaf = members.detach().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        total, losses = chunk_loss(leaf)
        check_constant(losses, leaf)
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(leaf) if gradient is None else gradient, losses.detach()


class _GradientsInForward(torch.autograd.Function):
    """A loss of groups with everything its backward needs: that multiplies by the upstream gradient and no more."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
        group: Any, bounds: Tensor | None, token_weights: Tensor, needed: tuple[bool, ...], dtype: torch.dtype,
        loss_fn: LossFunction, group_size: int, plan: tuple[list[_Run], int], told: int | None, mean: bool,
        scoring: tuple[Any, ...], stats: int, filter_eps: float | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ignore_index, shift, *_ = scoring
        operands = cast(dtype, hidden, weight, bias)
        wide = torch.promote_types(dtype, torch.float32)
        totals = [
            empty(tensor, tensor.shape, wide) if want and tensor is not None else None
            for tensor, want in zip((hidden, weight, bias), needed, strict=True)
        ]
        runs, rows = plan
        sequences = count_sequences(labels, cu_seqlens)
        groups = sequences // group_size
        targets, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
        index = sequence_index(scored, cu_seqlens)
        store = exponentials(hidden, rows, weight.shape[0], dtype)
        logps = hidden.new_zeros(sequences, dtype=wide)
        loss = hidden.new_zeros((), dtype=wide)
        scale = 1 / max(groups, 1) if mean else 1.0
        statistics: list[Tensor] = []
        for number, (begin, end, run_rows) in enumerate(runs):
            of_run = None if told is None else run_rows
            of_position = index % groups
            inside = (of_position >= begin) & (of_position < end)
            chunk = labels.clone()
            chunk[:, int(shift) :] = targets.masked_fill(~inside, ignore_index)
            token, norm, shares, *of_chunk = distributed.linear_logprobs(
                group, bounds, *operands, chunk, cu_seqlens, store, *scoring, stats, of_run, None, filter_eps
            )
            statistics = _merged(statistics, of_chunk)
            made = reduce_sequences(weigh(token, token_weights), scored, cu_seqlens, "sum", None, None)
            logps = logps + made

            # Groups of other chunks are there, at 0, so that the loss may hold something of its own for every group.
            gradient, losses = _loss_gradient(loss_fn, made.view(group_size, groups).T, begin, end)
            loss = loss + losses[begin:end].sum().to(wide)
            by_group = torch.arange(groups, device=made.device)
            of_groups = ((by_group >= begin) & (by_group < end))[:, None]
            by_sequence = torch.where(of_groups, gradient * scale, 0.0).T.reshape(-1)
            torch.ops.fastpref.linear_logprobs_backward_(
                by_sequence[index] * token_weights, None, *operands, chunk, cu_seqlens, norm, store, shares, *totals,
                number == 0, *scoring, of_run, None, filter_eps,
            )  # fmt: skip
        if group is not None and totals[0] is not None:
            # Not `told`, which may be fewer than were counted where the runs begin.
            of_runs = [run.rows for run in runs if run.rows is not None]
            rows = sum(of_runs) if told is not None and len(of_runs) == len(runs) else told
            distributed.reduce_hidden(group, totals[0], labels, cu_seqlens, shift, rows)
        kept = [loss.new_empty(0) if total is None else total for total in totals]
        return loss * scale, logps, *kept, *statistics

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

        triples = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        # Rounded to the parameter's dtype last, and never over what a second backward may need.
        return *(
            torch.ops.fastpref.scaled_gradient(saved, grads[0], dtype) if needed else None
            for saved, dtype, needed in triples
        ), *none


def _most_columns(weight: Tensor, shard: Shard | None) -> int | None:
    """Return the most columns of a rank; None where the host would have to wait for a device to know it."""
    if shard is None:
        return weight.shape[0]
    if isinstance(shard.largest, int) or ops.on_host(weight):
        return int(shard.largest)
    return None


def _group_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, shard: Shard | None, loss_fn: LossFunction, *,
    group_size: int, reduction: str, average_logps: bool, stats: tuple[str, ...], cu_seqlens: Tensor | None,
    ld_alpha: float | None, shared_lengths: Tensor | None, mode: str, chunk_rows: int | None,
    filter_eps: float | None, scored_rows: Any, ignore_index: int, shift: bool, temperature: float,
    logit_scale: float, softcap: float | None, known: ScoredRows | None = None, mixes_groups: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Return the loss, the sequences' log-probs (S,), detached, and the statistics, of tensors that are checked."""
    hidden, weight, bias, labels = enter(hidden, weight, bias, labels)
    chunk_rows, filter_eps = check_mode(mode, chunk_rows, filter_eps)
    ignore_index = check_scoring(ignore_index, shift)
    temperature, logit_scale, softcap = check_transform(temperature, logit_scale, softcap)
    check_choice("reduction", reduction, REDUCTIONS)
    check_bool("average_logps", average_logps)
    ld_alpha = check_ld(ld_alpha, shared_lengths)
    group_size = check_group(labels, cu_seqlens, group_size, ld_alpha, shared_lengths)
    names = check_stats(stats, LINEAR_STATISTICS)
    dtype = compute_dtype(hidden)
    sequences = count_sequences(labels, cu_seqlens)
    if known is None:
        known = resolve_rows(scored_rows, labels, cu_seqlens, count_columns(weight, shard), ignore_index, shift)
    rows_labels = labels[None] if labels.dim() == 1 else labels
    _, scored = scored_targets(rows_labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
    plan, held = None, "recompute" if mode == "auto" else mode
    # fp16 has not the range for exponentials, nor for a gradient before GradScaler's factor has entered it.
    # torch.func has no place for the small backward within a forward.
    apart = mode == "auto" and reduction != "none" and not mixes_groups and dtype != torch.float16 and not transformed()
    # A graph cannot be told how many rows the ranks of a group agree on, unless DTensors or the caller say it.
    agreed = shard is None or chunk_rows or isinstance(shard.largest, int) or not torch.compiler.is_compiling()
    if apart and agreed and wants_gradient(hidden, weight, bias):
        limit = chunk_rows or ops.loss_chunk_rows(weight, _most_columns(weight, shard), dtype)
        plan = _plan(known, scored, cu_seqlens, sequences, group_size, limit)
        if plan is not None and len(plan[0]) <= 1:
            # One chunk's exponentials may as well wait for the backward: its products then need no float32 buffer.
            plan, held = None, "save"
    if plan is None:
        result = linear_logprobs(
            hidden, weight, labels, bias, shard, held, chunk_rows, filter_eps, None,
            "mean" if average_logps else "sum", cu_seqlens, ld_alpha, shared_lengths, ignore_index, shift, temperature,
            logit_scale, softcap, stats, known,
        )  # fmt: skip
        logps, *statistics = result if names else (result,)
        members = logps.view(group_size, sequences // group_size).T
        losses = loss_fn(members)
        check_losses(losses, sequences // group_size)
        if not torch.compiler.is_compiling():
            check_constant(losses, members)
        return reduce(losses, reduction), logps.detach(), tuple(value.detach() for value in statistics)

    wide = torch.promote_types(dtype, torch.float32)
    token_weights = scored.to(wide)
    if ld_alpha is not None:
        token_weights = token_weights * ld_weights(scored, cu_seqlens, sequences, ld_alpha, shared_lengths, wide)
    if average_logps:
        lengths = sequence_lengths(scored, cu_seqlens, sequences).clamp(min=1)
        token_weights = token_weights / lengths[sequence_index(scored, cu_seqlens)]
    group, bounds, rows_labels, ignore_index = distributed.of_shard(
        shard, rows_labels, cu_seqlens, weight.shape[0], ignore_index, shift, checks=known.told is None
    )
    scoring = (ignore_index, shift, logit_scale, temperature, softcap)
    needed = tuple(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    loss, logps, _, _, _, *statistics = apply(
        _GradientsInForward, hidden[None] if hidden.dim() == 2 else hidden, weight, bias, rows_labels, cu_seqlens,
        group, bounds, token_weights, needed, dtype, loss_fn, group_size, plan, known.told, reduction == "mean",
        scoring,
        sum(1 << LINEAR_STATISTICS.index(name) for name in names), filter_eps,
    )  # fmt: skip
    shape = (*labels.shape[:-1], scored.shape[-1])
    return loss, logps, tuple(statistics[LINEAR_STATISTICS.index(name)].view(shape) for name in names)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    average_logps: bool = False,
    stats: tuple[str, ...] = (),
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    shared_lengths: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] | Mapping[str, float] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    length_normalize: bool = False,
    margin: Tensor | float | None = None,
    weights: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    reference_free: bool = False,
    delta: float = 0.0,
    gamma: float = 0.5,
    discopop_tau: float = 0.05,
    sft_weight: float = 0.0,
    sft_reduction: str = "token",
    mode: str = "auto",
    chunk_rows: int | None = None,
    filter_eps: float | None = None,
    scored_rows: int | Sequence[int] | None = None,
    process_group: Any = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Any:
    """`dpo_loss` of the log-probs of `linear_sequence_logprobs`, with the gradients made in the forward.

    The forward makes the loss and, if a backward may follow, the gradients of hidden, weight and bias, each only if it
    is required: 6·N·V·H operations for N scored rows, and exponentials of one chunk of pairs at a time. The backward
    multiplies them by the upstream gradient. Where all pairs fit in one chunk, its exponentials are kept and the
    gradients made from them in the backward: as many operations, and no float32 buffer of the weight's gradient.

    Args:
        hidden: (2B, T, H) = [chosen; rejected]; or packed with `cu_seqlens`, the first half of the sequences chosen.
        weight: (V, H), hidden's dtype.
        labels: (2B, T), or packed.
        ref_chosen_logps: (B,) log π_ref(chosen|x), a constant; not with `ref_hidden`.
        ref_rejected_logps: (B,) log π_ref(rejected|x), likewise.
        bias: None, or (V,).
        ref_hidden: the reference model's hidden states, of hidden's leading shape, scored by the same labels and
            options without gradients; with `ref_weight`, and `ref_bias` if its head has one.
        ref_weight: (V, H) of the reference model.
        ref_bias: (V,) of the reference model.
        average_logps: the mean of a sequence's token log-probs, and not their sum.
        stats: statistics of the tokens, as in `linear_token_logprobs`, detached; they follow the other results.
        cu_seqlens: as in `sequence_logprobs`, like the two after it.
        ld_alpha: α of LD-DPO.
        shared_lengths: (2B,) ints, with `ld_alpha`.
        beta: as in `dpo_loss`, like all down to `sft_reduction`.
        loss_type: which loss, or which losses, or a mapping of losses to their weights.
        loss_weights: one weight for each of a sequence of loss types.
        label_smoothing: ε.
        reduction: "mean", "sum" or "none".
        chosen_lengths: (B,); None: the numbers of scored labels.
        rejected_lengths: (B,); likewise.
        length_normalize: divide by the lengths. This, the types that do so anyway and the likelihood term take sums,
            and refuse `average_logps`.
        margin: m.
        weights: (B,), a factor of each pair's loss.
        f_divergence: which divergence.
        f_alpha: its α.
        reference_free: take the reference's log-probs as 0.
        delta: δ of `bco_pair`.
        gamma: γ of `simpo`.
        discopop_tau: τ of `discopop`.
        sft_weight: how much of the chosen completions' negative log-likelihood is added.
        sft_reduction: how that is divided.
        mode: "auto": gradients in the forward, unless `reduction="none"`, fp16, a loss that mixes pairs (`aot`,
            `aot_unpaired`), or a pair of more scored rows than a chunk: then the log-probs first and the products again
            in the backward, 8·N·V·H operations, with the same answers. "save" and "recompute" take the log-probs first,
            as `linear_token_logprobs` does.
        chunk_rows: the most scored rows whose exponentials are kept at a time. None: what fills 80 MiB on a CPU, 1 GiB
            on a GPU.
        filter_eps: as in `linear_token_logprobs`, like every argument after it.
        scored_rows: how many labels are scored, if the caller knows it. A batch of several chunks needs it for each
            sequence; of an int, the host reads where chunks begin.
        process_group: the ranks that hold the vocabulary's parts; of `ref_weight`, too, where that is no DTensor.
        ignore_index: the label that is not scored.
        shift: labels are aligned with `input_ids`.
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.

    Returns:
        A named tuple: loss, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps, then `stats`. All but the
        loss are detached; rewards and log-probs are (B,).

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: a wrong shape, device or option; a reference given twice, or not at all.
        IndexError: a scored label outside [0, V); on a GPU only where `scored_rows` is None.
    """
    hidden, weight, bias, labels, shard = resolve_head(hidden, weight, bias, labels, process_group)
    ref_shard = None
    if ref_weight is not None:
        ref_hidden, ref_weight, ref_bias, _, ref_shard = resolve_head(
            ref_hidden, ref_weight, ref_bias, labels, process_group
        )
    check_linear(hidden, weight, labels, bias, cu_seqlens, sharded=shard is not None)
    check_halves(labels, cu_seqlens)
    options = {
        "beta": beta, "loss_type": loss_type, "loss_weights": loss_weights, "label_smoothing": label_smoothing,
        "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, "length_normalize": length_normalize,
        "margin": margin, "weights": weights, "f_divergence": f_divergence, "f_alpha": f_alpha,
        "reference_free": reference_free, "delta": delta, "gamma": gamma, "discopop_tau": discopop_tau,
        "sft_weight": sft_weight, "sft_reduction": sft_reduction,
    }  # fmt: skip
    types, options = resolve_options(labels, cu_seqlens, ignore_index, shift, average_logps, reduction, options)
    reference_free = options["reference_free"]
    check_references(
        labels, cu_seqlens, ref_chosen_logps, ref_rejected_logps, ref_hidden, ref_weight, ref_bias, reference_free,
        ref_shard is not None,
    )  # fmt: skip
    known = None
    if ref_weight is not None and not reference_free:
        # One read serves both models: a label must be in the smaller vocabulary.
        ignore_index = check_scoring(ignore_index, shift)
        vocabulary = smaller(count_columns(weight, shard), count_columns(ref_weight, ref_shard))
        known = resolve_rows(scored_rows, labels, cu_seqlens, vocabulary, ignore_index, shift)
    scoring = {
        "cu_seqlens": cu_seqlens, "ld_alpha": ld_alpha, "shared_lengths": shared_lengths, "mode": mode,
        "chunk_rows": chunk_rows, "filter_eps": filter_eps, "scored_rows": scored_rows, "known": known,
        "ignore_index": ignore_index, "shift": shift, "temperature": temperature, "logit_scale": logit_scale,
        "softcap": softcap,
    }  # fmt: skip
    if ref_hidden is not None and not reference_free:
        assert ref_weight is not None
        with torch.no_grad():
            ref_logps = linear_logprobs(
                ref_hidden, ref_weight, labels, ref_bias, ref_shard, reduction="mean" if average_logps else "sum",
                stats=(), **{**scoring, "mode": "recompute"},
            )  # fmt: skip
        ref_chosen_logps, ref_rejected_logps = ref_logps.tensor_split(2)
    wide = torch.promote_types(compute_dtype(hidden), torch.float32)
    reference = tuple(
        None if logps is None or reference_free else logps.detach().to(wide)
        for logps in (ref_chosen_logps, ref_rejected_logps)
    )

    def pair_losses(members: Tensor) -> Tensor:
        return dpo_loss(*members.unbind(1), *reference, reduction="none", **options).loss

    loss, logps, statistics = _group_loss(
        hidden, weight, labels, bias, shard, pair_losses, group_size=2, reduction=reduction,
        average_logps=average_logps, stats=stats, mixes_groups=any(kind.mixes_pairs for kind, _ in types), **scoring,
    )  # fmt: skip
    chosen, rejected = logps.tensor_split(2)
    rewards = (
        beta * (policy if ref is None else policy - ref)
        for policy, ref in zip((chosen, rejected), reference, strict=True)
    )
    return linear_loss_type(check_stats(stats, LINEAR_STATISTICS))(loss, *rewards, chosen, rejected, *statistics)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_fn: LossFunction,
    *,
    bias: Tensor | None = None,
    group_size: int,
    reduction: str = "mean",
    average_logps: bool = False,
    stats: tuple[str, ...] = (),
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    shared_lengths: Tensor | None = None,
    mode: str = "auto",
    chunk_rows: int | None = None,
    filter_eps: float | None = None,
    scored_rows: int | Sequence[int] | None = None,
    process_group: Any = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Any:
    """Any loss of groups of K sequences from hidden states, with the gradients made in the forward.

    K-way DPO, for one, is `loss_fn=lambda logps: ranking_loss(implicit_reward(logps, ref), ranks, reduction="none")`.

    Args:
        hidden: (K·G, T, H), member-major: sequence k·G + g is member k of group g; or packed with `cu_seqlens`.
        weight: (V, H), hidden's dtype.
        labels: (K·G, T), or packed.
        loss_fn: (G, K) sequence log-probs -> (G,) losses, each group's of its own row alone. It is called once a chunk,
            with zeros for the groups of other chunks, and differentiated by its argument only: what it closes over must
            be constant.
        bias: None, or (V,).
        group_size: K.
        reduction: "mean" over G, "sum", or "none" for (G,). The mean of no groups is 0.
        average_logps: as in `linear_dpo_loss`, like every argument after it.
        stats: statistics of the tokens.
        cu_seqlens: packed boundaries.
        ld_alpha: α of LD-DPO; without `shared_lengths` for pairs only.
        shared_lengths: (K·G,) ints, with `ld_alpha`.
        mode: how and when the gradients are made.
        chunk_rows: the most scored rows whose exponentials are kept at a time.
        filter_eps: the softmax mass below which columns are left out of the gradient.
        scored_rows: how many labels are scored, if the caller knows it.
        process_group: the ranks that hold the vocabulary's parts.
        ignore_index: the label that is not scored.
        shift: labels are aligned with `input_ids`.
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.

    Returns:
        A named tuple: loss, logps (G, K) detached, then `stats`.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: a wrong shape, device or option; losses of another shape than (G,), or that would train something
            `loss_fn` closes over (outside of `torch.compile`, where that is constant).
        IndexError: a scored label outside [0, V); on a GPU only where `scored_rows` is None.
    """
    hidden, weight, bias, labels, shard = resolve_head(hidden, weight, bias, labels, process_group)
    check_linear(hidden, weight, labels, bias, cu_seqlens, sharded=shard is not None)
    loss, logps, statistics = _group_loss(
        hidden, weight, labels, bias, shard, loss_fn, group_size=group_size, reduction=reduction,
        average_logps=average_logps, stats=stats, cu_seqlens=cu_seqlens, ld_alpha=ld_alpha,
        shared_lengths=shared_lengths, mode=mode, chunk_rows=chunk_rows, filter_eps=filter_eps, scored_rows=scored_rows,
        ignore_index=ignore_index, shift=shift, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
    members = logps.view(group_size, logps.shape[0] // group_size).T
    return linear_group_type(check_stats(stats, LINEAR_STATISTICS))(loss, members, *statistics)

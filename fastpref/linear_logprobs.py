"""Log-probs from hidden states and the head's weight: the logits exist a tile at a time, in float32, never whole."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpref import distributed
from fastpref._checks import (
    REDUCTIONS,
    autocasts,
    check_choice,
    check_ld,
    check_linear,
    check_mode,
    check_scoring,
    check_transform,
)
from fastpref._function import apply, enter, has_values, once_differentiable, wants_gradient
from fastpref._results import LINEAR_STATISTICS, check_stats, result_type
from fastpref._rows import ScoredRows, count_columns, resolve_rows
from fastpref._sharding import Shard, resolve_head
from fastpref.reference.logprobs import ld_weights, scored_targets, sequence_index, sequence_lengths, weigh
from fastpref_kernels import ops

logger = logging.getLogger(__name__)

SAVE_BUDGET = 1 << 30
"""Bytes of kept exponentials, positions × V × itemsize, up to which `mode="auto"` is "save"."""


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What hidden states, weight and bias are multiplied in: autocast's dtype where it is on, else their own."""
    if autocasts(hidden.device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """The operands in the dtype they are multiplied in."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory that lives until a backward; in a compiled graph the compiler's to plan."""
    # Of a subclass that is several tensors, each has memory of its own.
    ours = has_values(like) and not is_traceable_wrapper_subclass(like)
    return ops.empty(like, shape, dtype) if ours else like.new_empty(shape, dtype=dtype)


def exponentials(like: Tensor, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised room for the exponentials of `rows`, (rows, V), every row on a cache line of its own."""
    columns = (vocabulary + 31) // 32 * 32
    store = empty(like, (rows, columns), dtype)
    return store if columns == vocabulary else store[:, :vocabulary]


class _LinearLogprobs(torch.autograd.Function):
    """`fastpref::linear_logprobs` and its backward.

    `capacity` is the number of rows whose exponentials are kept, 0 to make the logits again; `dtype` is what the
    operands are multiplied in. With a group, the weight is its shard at `bounds`, and labels are the shard's.
    """

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
        group: Any, bounds: Tensor | None, capacity: int, dtype: torch.dtype, scoring: tuple[Any, ...], stats: int,
        *chunking: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        operands = cast(dtype, hidden, weight, bias)
        store = exponentials(hidden, capacity, weight.shape[0], dtype)
        arguments = (labels, cu_seqlens, store if capacity else None, *scoring, stats, *chunking)
        logps, norm, shares, *statistics = distributed.linear_logprobs(group, bounds, *operands, *arguments)
        return logps, norm, shares, store, *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, labels, cu_seqlens, ctx.group, _, *options = inputs
        ctx.capacity, ctx.dtype, ctx.scoring, stats, *ctx.chunking = options
        _, norm, shares, store, lse, entropy, *others = output
        ctx.with_entropy = bool(stats & 2)
        constant = [norm, shares, store, lse, *others]
        ctx.mark_non_differentiable(*(constant if ctx.with_entropy else [*constant, entropy]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, norm, store, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad, grad_entropy = grads[0], grads[5] if ctx.with_entropy else None
        none = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None and grad_entropy is None:
            return (None, None, None, *none)
        hidden, weight, bias, labels, cu_seqlens, norm, store, shares = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        dtypes = [(hidden if tensor is None else tensor).dtype for tensor in (hidden, weight, bias)]
        if ctx.group is not None:
            dtypes[0] = torch.promote_types(ctx.dtype, torch.float32)  # rounded after the sum over ranks
        gradients = torch.ops.fastpref.linear_logprobs_backward(
            grad, grad_entropy, *cast(ctx.dtype, hidden, weight, bias), labels, cu_seqlens, norm,
            store if ctx.capacity else None, shares, needed, *dtypes, *ctx.scoring, *ctx.chunking,
        )  # fmt: skip
        if ctx.group is not None and needed[0]:
            d_hidden = distributed.reduce_hidden(
                ctx.group, gradients[0], labels, cu_seqlens, ctx.scoring[1], ctx.chunking[0]
            )
            gradients = (d_hidden.to(hidden.dtype), *gradients[1:])
        return *(gradient if want else None for gradient, want in zip(gradients, needed, strict=True)), *none


def choose_mode(mode: str, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> str:
    """ "save" or "recompute", for "auto" from shapes and dtype alone, so that every run chooses the same.

    Ranks whose parts of a vocabulary differ may choose differently: what travels between them is the same.
    """
    if mode == "save" and dtype == torch.float16:
        raise ValueError('mode="save" keeps exponentials, and fp16 has not their range; use "recompute" or "auto"')
    if mode != "auto":
        return mode
    size = hidden.numel() // hidden.shape[-1] * weight.shape[0] * dtype.itemsize
    chosen = "save" if size <= SAVE_BUDGET and dtype != torch.float16 else "recompute"
    if not torch.compiler.is_compiling():
        logger.debug('mode="auto" is "%s": exponentials of %d bytes, budget %d, %s', chosen, size, SAVE_BUDGET, dtype)
    return chosen


def reduce_sequences(
    logps: Tensor, scored: Tensor, cu_seqlens: Tensor | None, reduction: str, ld_alpha: float | None,
    shared_lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """Token log-probs (B, T') to sequence log-probs (S,)."""
    sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weighted = logps
    if ld_alpha is not None:
        weighted = weigh(logps, ld_weights(scored, cu_seqlens, sequences, ld_alpha, shared_lengths, logps.dtype))
    if cu_seqlens is None:
        total = weighted.sum(-1, dtype=torch.float64)
    else:
        index = sequence_index(scored, cu_seqlens).reshape(-1)
        total = logps.new_zeros(sequences, dtype=torch.float64).index_add(0, index, weighted.reshape(-1).double())
    if reduction == "mean":
        total = total / sequence_lengths(scored, cu_seqlens, sequences).clamp(min=1)
    return total.to(logps.dtype)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, shard: Shard | None, mode: str,
    chunk_rows: int | None, filter_eps: float | None, scored_rows: Any, reduction: str, cu_seqlens: Tensor | None,
    ld_alpha: float | None, shared_lengths: Tensor | None, ignore_index: int, shift: bool, temperature: float,
    logit_scale: float, softcap: float | None, stats: tuple[str, ...], known: ScoredRows | None = None,
) -> Any:  # fmt: skip
    """Compute what both public functions give, from plain tensors that are checked; "none" is for the first.

    `known` stands in for `scored_rows` where a caller has resolved it.
    """
    hidden, weight, bias, labels = enter(hidden, weight, bias, labels)
    chunk_rows, filter_eps = check_mode(mode, chunk_rows, filter_eps)
    ignore_index = check_scoring(ignore_index, shift)
    temperature, logit_scale, softcap = check_transform(temperature, logit_scale, softcap)
    names = check_stats(stats, LINEAR_STATISTICS)
    if known is None:
        known = resolve_rows(scored_rows, labels, cu_seqlens, count_columns(weight, shard), ignore_index, shift)
    rows_shape = labels.shape[:-1]
    hidden = hidden[None] if hidden.dim() == 2 else hidden
    labels = labels[None] if labels.dim() == 1 else labels
    dtype = compute_dtype(hidden)
    saves = choose_mode(mode, hidden, weight, dtype) == "save" and wants_gradient(hidden, weight, bias)
    _, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
    capacity = known.room(scored) if saves else 0
    group, bounds, labels, ignore_index = distributed.of_shard(
        shard, labels, cu_seqlens, weight.shape[0], ignore_index, shift, checks=known.told is None
    )
    scoring = (ignore_index, shift, logit_scale, temperature, softcap)
    bits = sum(1 << LINEAR_STATISTICS.index(name) for name in names)
    logps, _, _, _, *statistics = apply(
        _LinearLogprobs, hidden, weight, bias, labels, cu_seqlens, group, bounds, capacity, dtype, scoring, bits,
        known.told, chunk_rows, filter_eps,
    )  # fmt: skip

    def rows(values: Tensor) -> Tensor:
        return values if rows_shape else values.view(-1)

    if reduction == "none":
        result = rows(logps)
    else:
        result = reduce_sequences(logps, scored, cu_seqlens, reduction, ld_alpha, shared_lengths)
    if not names:
        return result
    return result_type(names)(result, *(rows(statistics[LINEAR_STATISTICS.index(name)]) for name in names))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
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
    stats: tuple[str, ...] = (),
) -> Any:
    """Log-prob of every label under the logits hidden @ weightᵀ + bias, which never exist whole.

    logp = z_y − log Σ_j exp z_j, with z the transformed logits, as `token_logprobs` defines them. Only scored rows are
    multiplied. Logits are float32 sums, never rounded before the log-sum; gradients are summed in float32, and made
    only for the arguments that require them. Under autocast the operands are cast to its dtype, and the results stay
    float32.

    Args:
        hidden: (B, T, H), or (T, H) for one sequence; fp16, bf16, fp32 or fp64.
        weight: (V, H), hidden's dtype.
        labels: (B, T) or (T,), int64 or int32.
        bias: None, or (V,), hidden's dtype.
        mode: how a backward gets its probabilities. "save" keeps the forward's exponentials, scored × V numbers in
            hidden's dtype, and takes 6·N·V·H flop for N scored rows in all; "recompute" multiplies again,
            8·N·V·H, and its memory does not grow with N·V; "auto" is "save" where positions × V numbers are within
            `SAVE_BUDGET`, 1 GiB, and the dtype has the range (fp16 has not), and says which at debug level. An
            entropy's gradient always recomputes. A multiply-add is two flop.
        chunk_rows: the rows of a tile of logits. None: 1024 on a CPU, 4096 on a GPU. A tile holds 4096 columns.
        filter_eps: None: exact. Otherwise a row's gradient leaves out every 4096 columns whose softmax mass is below
            it, unless they hold the label: their products are not made. The statistic "dropped_mass" says what it cost.
            A backward through the statistic "entropy" is exact: it leaves nothing out, of the log-probs' part either.
        scored_rows: how many labels are scored, or a number that is no smaller: an int for the batch, or a sequence of
            ints, one for each sequence. A GPU then works without the host ever waiting for it, and a CUDA graph can
            hold the call; None: the host reads the number once. On a GPU nothing checks what is given: where more are
            scored, or a label is outside of the vocabulary, log-probs are NaN. A graph of `torch.compile` on a CPU
            does without the number.
        process_group: the ranks that hold the vocabulary's parts in their order, each with some rows of the weight
            (and of the bias) as `weight`, as many as it likes; or a one-dimensional device mesh. All give the same
            hidden states and labels, and get the same results, and the same gradient of the hidden states. None: the
            weight is whole, or a DTensor whose placements are `Shard(0)` on one dimension of its mesh. `filter_eps`
            then goes by columns of each part.
        ignore_index: as in `token_logprobs`, like every argument after it.
        shift: `labels` are aligned with `input_ids`: hidden[:, t] scores labels[:, t+1].
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.
        stats: names of `token_logprobs`' statistics; or "dropped_mass", the softmax mass that a gradient of the
            log-probs alone leaves out of each token's, 0 without `filter_eps`. It is told in the forward, so also where
            the backward then goes through the entropy as well, and leaves nothing out.

    Returns:
        (B, T−1), or (B, T) without `shift`; float32 (float64 for float64). With `stats`, a named tuple: `logprobs`,
        then the statistics, in the order asked for.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: a wrong shape, device or option; `mode="save"` with fp16; a DTensor that is split in another way, or
            ranks that give different hidden states.
        IndexError: a scored label outside [0, V); on a GPU only where `scored_rows` is None.
    """
    hidden, weight, bias, labels, shard = resolve_head(hidden, weight, bias, labels, process_group)
    check_linear(hidden, weight, labels, bias, None, sharded=shard is not None)
    return linear_logprobs(
        hidden, weight, labels, bias, shard, mode, chunk_rows, filter_eps, scored_rows, "none", None, None, None,
        ignore_index, shift, temperature, logit_scale, softcap, stats,
    )  # fmt: skip


def linear_sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "sum",
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
    stats: tuple[str, ...] = (),
) -> Any:
    """Log-prob of every sequence: the sum, or mean, of `linear_token_logprobs` over its scored tokens.

    Args:
        hidden: (B, T, H); or packed, (N, H) or (1, N, H), with `cu_seqlens`.
        weight: (V, H).
        labels: (B, T); or packed, (N,) or (1, N).
        bias: None, or (V,).
        reduction: "sum", or "mean": divided by the sequence's number of scored tokens (0 where there is none).
        cu_seqlens: as in `sequence_logprobs`, like the two after it.
        ld_alpha: α of LD-DPO (arXiv 2409.06411).
        shared_lengths: (S,) ints, with `ld_alpha`.
        mode: as in `linear_token_logprobs`, like every argument after it.
        chunk_rows: the rows of a tile of logits.
        filter_eps: the softmax mass below which columns are left out of the gradient.
        scored_rows: how many labels are scored, if the caller knows it.
        process_group: the ranks that hold the vocabulary's parts.
        ignore_index: the label that is not scored.
        shift: labels are aligned with `input_ids`.
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.
        stats: names of statistics, still per token.

    Returns:
        (B,), or (S,) packed; float32 (float64 for float64). With `stats`, a named tuple whose first field, `logprobs`,
        is that.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: a wrong shape, device or option.
        IndexError: a scored label outside [0, V); on a GPU only where `scored_rows` is None.
    """
    check_choice("reduction", reduction, REDUCTIONS[1:])
    ld_alpha = check_ld(ld_alpha, shared_lengths)
    hidden, weight, bias, labels, shard = resolve_head(hidden, weight, bias, labels, process_group)
    check_linear(hidden, weight, labels, bias, cu_seqlens, sharded=shard is not None)
    return linear_logprobs(
        hidden, weight, labels, bias, shard, mode, chunk_rows, filter_eps, scored_rows, reduction, cu_seqlens, ld_alpha,
        shared_lengths, ignore_index, shift, temperature, logit_scale, softcap, stats,
    )  # fmt: skip

"""Log-probs from hidden states and the head's weight: the logits exist a tile at a time, in float32, never whole."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpref._core.autograd import apply, has_values, once_differentiable, wants_gradient
from fastpref._core.options import TOKENS, LinearOptions, Reduction
from fastpref._core.resolve import LinearBatch, Operands, count_rows, named_result, resolve_linear, statistic_bits
from fastpref._core.sequences import reduce_sequences
from fastpref.distributed import linear as distributed
from fastpref_kernels import ops
from fastpref_kernels.contract import Scoring, constant_statistics, statistic_gradient

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastpref._core.keywords import LinearKeywords, LinearSequenceKeywords
    from fastpref._core.results import Logprobs

logger = logging.getLogger(__name__)

SAVE_BUDGET = 1 << 30
"""Bytes of kept exponentials, positions × V × itemsize, up to which `mode="auto"` is "save"."""


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors in a dtype, and None for None."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialized memory that lives until a backward; the compiler plans it in a compiled graph."""
    # If `like` is a subclass that wraps several tensors, each of them gets memory of its own.
    ours = has_values(like) and not is_traceable_wrapper_subclass(like)
    return ops.empty(like, shape, dtype) if ours else like.new_empty(shape, dtype=dtype)


def exponentials(like: Tensor, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialized memory (rows, V) for the exponentials of rows. Each row starts at a cache line."""
    columns = (vocabulary + 31) // 32 * 32
    store = empty(like, (rows, columns), dtype)
    return store if columns == vocabulary else store[:, :vocabulary]


class Call(NamedTuple):
    """The options of one call of the operator and its backward.

    Attributes:
        scoring: which labels are scored, on which transform of the logits.
        dtype: the dtype in which the operands are multiplied.
        stats: the bits of the statistics that are asked for.
        chunk_rows: the most rows of a tile of logits, or None.
        filter_eps: the softmax mass below which columns are left out of the gradient, or None.
    """

    scoring: Scoring
    dtype: torch.dtype
    stats: int
    chunk_rows: int | None
    filter_eps: float | None


class _LinearLogprobs(torch.autograd.Function):
    """Run `fastpref::linear_logprobs` and its backward.

    `capacity` is the number of rows whose exponentials are kept; with 0, the backward computes the logits again. `told`
    is the number of rows that is passed to the operators. With a group, the weight is its shard at `bounds`, and the
    labels are columns of this shard.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        bounds: Tensor | None,
        group: Any,
        capacity: int,
        told: int | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        store = exponentials(hidden, capacity, weight.shape[0], call.dtype)
        part = distributed.Part(group, bounds, labels, call.scoring)
        result = distributed.linear_logprobs(
            part,
            cast(call.dtype, hidden, weight, bias),
            cu_seqlens,
            store if capacity else None,
            call.stats,
            (told, call.chunk_rows, call.filter_eps),
        )
        return result.logps, result.norm, result.shares, store, *result.statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, labels, cu_seqlens, _, ctx.group, ctx.capacity, ctx.told, ctx.call = inputs
        _, norm, shares, store, *statistics = output
        ctx.mark_non_differentiable(norm, shares, store, *constant_statistics(statistics, ctx.call.stats))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, norm, store, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad, _, _, _, *of_statistics = grads
        call = ctx.call
        grad_entropy = statistic_gradient(of_statistics, call.stats)
        none = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None and grad_entropy is None:
            return (None, None, None, *none)
        hidden, weight, bias, labels, cu_seqlens, norm, store, shares = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        dtypes = [(hidden if tensor is None else tensor).dtype for tensor in (hidden, weight, bias)]
        if ctx.group is not None:
            dtypes[0] = torch.promote_types(call.dtype, torch.float32)  # rounded after the sum over ranks
        operands = cast(call.dtype, hidden, weight, bias)
        kept = (norm, store if ctx.capacity else None, shares)
        chunking = (ctx.told, call.chunk_rows, call.filter_eps)
        gradients = torch.ops.fastpref.linear_logprobs_backward(
            grad, grad_entropy, *operands, labels, cu_seqlens, *kept, needed, *dtypes, *call.scoring, *chunking
        )
        if ctx.group is not None and needed[0]:
            shift = call.scoring.shift
            d_hidden = distributed.reduce_hidden(ctx.group, gradients[0], labels, cu_seqlens, shift, ctx.told)
            gradients = (d_hidden.to(hidden.dtype), *gradients[1:])
        return *(gradient if want else None for gradient, want in zip(gradients, needed, strict=True)), *none


def choose_mode(batch: LinearBatch) -> str:
    """Return "save" or "recompute"; for "auto", choose by shapes and dtype only, so that every run chooses the same.

    Ranks whose parts of the vocabulary differ may choose differently, because they exchange the same values in both
    modes.
    """
    mode, dtype = batch.options.mode, batch.dtype
    if mode == "save" and dtype == torch.float16:
        raise ValueError(
            "mode='save' does not support float16: stored exponentials overflow. Use mode='recompute' or mode='auto'"
        )
    if mode != "auto":
        return mode
    size = batch.hidden.numel() // batch.hidden.shape[-1] * batch.weight.shape[0] * dtype.itemsize
    chosen = "save" if size <= SAVE_BUDGET and dtype != torch.float16 else "recompute"
    if not torch.compiler.is_compiling():
        logger.debug('mode="auto" is "%s": exponentials of %d bytes, budget %d, %s', chosen, size, SAVE_BUDGET, dtype)
    return chosen


def score(batch: LinearBatch, reduction: Reduction) -> tuple[Tensor, list[Tensor]]:
    """Return the log-probs, (B, T') or (S,), and the operator's statistics."""
    hidden, weight, bias, labels, scored, cu_seqlens, *_ = batch
    saves = choose_mode(batch) == "save" and wants_gradient(hidden, weight, bias)
    capacity = batch.rows.room(scored) if saves else 0
    told = batch.rows.told
    part = distributed.part_of(batch.shard, labels, cu_seqlens, weight.shape[0], batch.scoring, told is None)
    options = batch.options
    call = Call(part.scoring, batch.dtype, statistic_bits(batch.stats), options.chunk_rows, options.filter_eps)
    tensors = (hidden, weight, bias, part.labels, cu_seqlens, part.bounds)
    logps, _, _, _, *statistics = apply(_LinearLogprobs, *tensors, part.group, capacity, told, call)
    if reduction.name != "none":
        return reduce_sequences(logps, scored, cu_seqlens, reduction), statistics
    return logps.view(-1) if batch.flat else logps, statistics


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    stats: tuple[()] = ...,
    **keywords: Unpack[LinearKeywords],
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    stats: tuple[str, ...],
    **keywords: Unpack[LinearKeywords],
) -> Logprobs: ...


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
    """Return the log-prob of each label under the logits hidden @ weightᵀ + bias, which never exist whole.

    logp = z_y − log Σ_j exp z_j, with z the transformed logits, as `token_logprobs` defines them. The function
    multiplies only scored rows. Logits are float32 sums that are not rounded before the log-sum. Gradients are summed
    in float32, and computed only for the arguments that require them. Under autocast the operands are cast to its
    dtype, and the results stay float32.

    Args:
        hidden: (B, T, H), or (T, H) for one sequence; fp16, bf16, fp32 or fp64.
        weight: (V, H), in hidden's dtype.
        labels: (B, T) or (T,), int64 or int32.
        bias: None, or (V,), in hidden's dtype.
        mode: how the backward gets the probabilities. "save" keeps the exponentials of the forward, N × V numbers in
            hidden's dtype for N scored rows, and takes 6·N·V·H flops in all. "recompute" multiplies again: it takes
            8·N·V·H flops, and its memory does not grow with N·V. "auto" is "save" where positions × V numbers fit in
            `SAVE_BUDGET`, 1 GiB, and the dtype is not float16, whose range is too short for them; the choice is logged
            at debug level. The gradient of an entropy always recomputes.
        chunk_rows: the rows of a tile of logits. None: 1024 on a CPU, 4096 on a GPU. A tile holds 4096 columns.
        filter_eps: None for exact gradients. With a number, the gradient of a row skips the products of every block of
            4096 columns whose softmax mass is below it, unless the block holds the label. The statistic "dropped_mass"
            reports the skipped mass. A backward through the statistic "entropy" skips nothing.
        scored_rows: the number of scored labels, or an upper bound: an int for the batch, or a sequence of one int for
            each sequence. With it the host never waits for a GPU, and a CUDA graph can hold the call. None: the host
            reads the number once. A GPU does not check it: if more labels are scored, or one is outside of the
            vocabulary, the log-probs are NaN. A graph of `torch.compile` on a CPU does not need it.
        process_group: the ranks among which the vocabulary is split, in order, or a one-dimensional device mesh. Each
            rank passes its own rows of the weight (and of the bias), of any number. All ranks pass the same hidden
            states and labels, and get the same results and the same gradient of the hidden states. None: the weight is
            whole, or a DTensor that is `Shard(0)` on one dimension of its mesh. `filter_eps` applies to the columns of
            each rank.
        ignore_index: as in `token_logprobs`, like every argument after it.
        shift: whether `labels` are aligned with `input_ids`: hidden[:, t] then scores labels[:, t+1].
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.
        stats: names of the statistics of `token_logprobs`, and "dropped_mass", the softmax mass that `filter_eps`
            leaves out of each token's gradient (0 without it).

    Returns:
        A tensor (B, T−1), or (B, T) without `shift`; float32 (float64 for float64). With `stats`, a named tuple:
        `logprobs`, then the statistics, in the order of `stats`.

    Raises:
        TypeError: a dtype or the type of an option is wrong.
        ValueError: a shape, a device or an option is wrong; `mode="save"` with float16; a DTensor is split in another
            way, or the ranks pass different hidden states.
        IndexError: a scored label is outside [0, V). A GPU checks this only where `scored_rows` is None.
    """
    scoring = Scoring(ignore_index, shift, logit_scale, temperature, softcap)
    options = LinearOptions(mode, chunk_rows, filter_eps)
    operands = Operands(hidden, weight, bias)
    batch = resolve_linear(operands, labels, None, scoring, options, stats=stats, process_group=process_group)
    batch = count_rows(batch, scored_rows)
    logps, statistics = score(batch, TOKENS)
    return named_result(batch, logps, statistics)


@overload
def linear_sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    stats: tuple[()] = ...,
    **keywords: Unpack[LinearSequenceKeywords],
) -> Tensor: ...


@overload
def linear_sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    stats: tuple[str, ...],
    **keywords: Unpack[LinearSequenceKeywords],
) -> Logprobs: ...


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
    """Return the log-prob of each sequence: the sum, or the mean, of `linear_token_logprobs` over its scored tokens.

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
        scored_rows: the number of scored labels, if the caller knows it.
        process_group: the ranks among which the vocabulary is split.
        ignore_index: the label that is not scored.
        shift: whether labels are aligned with `input_ids`.
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.
        stats: names of statistics, which are per token here too.

    Returns:
        A tensor (B,), or (S,) if packed; float32 (float64 for float64). With `stats`, a named tuple whose first field,
        `logprobs`, is this tensor.

    Raises:
        TypeError: a dtype or the type of an option is wrong.
        ValueError: a shape, a device or an option is wrong.
        IndexError: a scored label is outside [0, V). A GPU checks this only where `scored_rows` is None.
    """
    over = Reduction.checked(reduction, ld_alpha, shared_lengths)
    scoring = Scoring(ignore_index, shift, logit_scale, temperature, softcap)
    options = LinearOptions(mode, chunk_rows, filter_eps)
    operands = Operands(hidden, weight, bias)
    batch = resolve_linear(operands, labels, cu_seqlens, scoring, options, stats=stats, process_group=process_group)
    batch = count_rows(batch, scored_rows)
    logps, statistics = score(batch, over)
    return named_result(batch, logps, statistics)

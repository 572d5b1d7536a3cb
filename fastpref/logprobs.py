"""Log-probs from logits: one pass over the scored rows forward, one backward, no copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref._checks import (
    REDUCTIONS,
    check_bool,
    check_choice,
    check_ld,
    check_logits,
    check_scoring,
    check_transform,
)
from fastpref._function import apply, enter, once_differentiable
from fastpref._results import STATISTICS, check_stats, result_type
from fastpref._sharding import resolve_logits
from fastpref.distributed import sharded_logprobs
from fastpref.linear_logprobs import reduce_sequences
from fastpref.reference.logprobs import ld_weights, scored_targets
from fastpref_kernels import ops

assert ops  # importing it registers the operators


class _Logprobs(torch.autograd.Function):
    """`fastpref::logprobs` and its backward. Arguments as the operator's, then `inplace_backward`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.fastpref.logprobs(*arguments[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, cu_seqlens, weights, *scoring, stats, inplace = inputs
        logps, sequences, norm, counts, lse, entropy, mean_logits, is_top1, log_sum_sq_probs = output
        reduced = scoring[-1] != "none"
        constant = [norm, counts, lse, mean_logits, is_top1, log_sum_sq_probs, logps if reduced else sequences]
        ctx.with_entropy = bool(stats >> STATISTICS.index("entropy") & 1)
        if not ctx.with_entropy:
            constant.append(entropy)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        # What the backward needs of the outputs has a copy in `norm`: users may write to theirs.
        ctx.save_for_backward(logits, labels, cu_seqlens, weights, norm, counts)
        ctx.scoring, ctx.reduced, ctx.inplace = scoring, reduced, inplace

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # A compiled graph hands a zero gradient even to an output that was never asked for.
        grad, grad_entropy = grads[1] if ctx.reduced else grads[0], grads[5] if ctx.with_entropy else None
        none = (None,) * 11
        if grad is None and grad_entropy is None:
            return (None, *none)
        arguments = (grad, grad_entropy, *ctx.saved_tensors, *ctx.scoring)
        if not ctx.inplace:
            return (torch.ops.fastpref.logprobs_backward(*arguments), *none)
        logits = arguments[2]
        assert logits is not None
        torch.ops.fastpref.logprobs_backward_(*arguments)
        # A kernel's writes do not show in the version counter, and every later use of these logits must raise.
        torch.autograd.graph.increment_version(logits)
        return (logits.detach(), *none)


def _overlaps(logits: Tensor) -> bool:
    """Whether two elements of a strided tensor may share memory: a stride steps inside what smaller ones span."""
    axes = [(stride, size, axis) for axis, (stride, size) in enumerate(zip(logits.stride(), logits.shape, strict=True))]
    for stride, size, axis in axes:
        # Compared one by one and not sorted: in a compiled graph of dynamic shapes these are symbols.
        smaller = [(s, n) for s, n, other in axes if s < stride or (s == stride and other < axis)]
        if size > 1 and stride < 1 + sum(s * (n - 1) for s, n in smaller):
            return True
    return False


def _check_inplace(logits: Tensor) -> None:
    base = logits if logits._base is None else logits._base
    if base.requires_grad and base.is_leaf:
        raise ValueError(
            "inplace_backward=True writes the gradient over the logits, and these are a leaf that requires grad, or a "
            "view of one: pass a model's output, or inplace_backward=False"
        )
    if _overlaps(logits):
        raise ValueError(
            "inplace_backward=True needs logits whose elements do not share memory; got strides "
            f"{logits.stride()} for shape {tuple(logits.shape)}"
        )


def _logprobs(
    logits: Tensor, labels: Tensor, reduction: str, cu_seqlens: Tensor | None, ld_alpha: float | None,
    shared_lengths: Tensor | None, ignore_index: int, shift: bool, temperature: float, logit_scale: float,
    softcap: float | None, stats: tuple[str, ...], inplace_backward: bool, process_group: Any,
) -> Any:  # fmt: skip
    check_bool("inplace_backward", inplace_backward)
    logits, labels, shard = resolve_logits(logits, labels, process_group, inplace_backward)
    check_logits(logits, labels, cu_seqlens, sharded=shard is not None)
    logits, labels = enter(logits, labels)
    ignore_index = check_scoring(ignore_index, shift)
    temperature, logit_scale, softcap = check_transform(temperature, logit_scale, softcap)
    names = check_stats(stats)
    if inplace_backward:
        _check_inplace(logits)
    rows_shape = labels.shape[:-1]
    if logits.dim() == 2:
        logits = logits[None]
    if labels.dim() == 1:
        labels = labels[None]
    bits = sum(1 << STATISTICS.index(name) for name in names)
    transform = (logit_scale, temperature, softcap)
    if shard is not None:
        _, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
        logps, *statistics = sharded_logprobs(
            shard, logits, labels, cu_seqlens, (ignore_index, shift, *transform), bits, inplace_backward
        )
        sequences = logps
        if reduction != "none":
            sequences = reduce_sequences(logps, scored, cu_seqlens, reduction, ld_alpha, shared_lengths)
    else:
        weights = None
        if ld_alpha is not None:
            _, scored = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
            sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            dtype = torch.promote_types(logits.dtype, torch.float32)
            weights = ld_weights(scored, cu_seqlens, sequences, ld_alpha, shared_lengths, dtype)
        logps, sequences, _, _, *statistics = apply(
            _Logprobs, logits, labels, cu_seqlens, weights, ignore_index, shift, *transform, reduction, bits,
            inplace_backward,
        )  # fmt: skip

    def rows(values: Tensor) -> Tensor:
        return values.view(*rows_shape, values.shape[-1])

    result = rows(logps) if reduction == "none" else sequences
    if not names:
        return result
    return result_type(names)(result, *(rows(statistics[STATISTICS.index(name)]) for name in names))


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
    """Log-prob of every label under its logits: logp = z_y − log Σ_j exp z_j, in nats.

    The logits are read once, where they are scored, and never copied, padded or widened; the gradient
    ∂logp/∂z_j = 1[j = y] − softmax(z)_j is written once, in logits' dtype and full shape, zeros where not scored.

    z = softcap·tanh(logits·logit_scale/softcap)/temperature, each part optional (Gemma 2's soft cap, arXiv 2408.00118;
    Cohere's logit scale).

    Args:
        logits: (B, T, V), or (T, V) for one sequence; fp16, bf16, fp32 or fp64, any strides.
        labels: (B, T) or (T,), int64 or int32.
        ignore_index: a label that is not scored: log-prob 0, gradient 0, its logits never read.
        shift: True: `labels` are aligned with `input_ids`, and logits[:, t] score labels[:, t+1]; False: already
            aligned, logits[:, t] score labels[:, t].
        temperature: divides the logits, last; above 0.
        logit_scale: multiplies the logits, first; above 0.
        softcap: None, or the cap of the logits' magnitude, above 0.
        stats: names of per-token statistics made in the same pass, 0 (or False) where not scored: "lse" (log Σ exp z),
            "entropy" (−Σ p log p, differentiable), "mean_logits" (the mean of z over the vocabulary), "is_top1" (the
            label is the first argmax), "log_sum_sq_probs" (log Σ p²).
        inplace_backward: write the gradient over the logits, which saves its memory. Any later use of them in a
            backward then raises; a read after it reads the gradient.
        process_group: the ranks that hold the vocabulary's parts in their order, each with the logits of its own
            columns, as many as it likes; or a one-dimensional device mesh. All give the same labels, and get the same
            results. None: the logits are whole, or a DTensor that is `Shard(-1)` on one dimension of its mesh.

    Returns:
        (B, T−1), or (B, T) without `shift`; float32 (float64 for float64 logits), never above 0. With `stats`, a named
        tuple: `logprobs`, then the statistics, of the same shape, in the order asked for.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: a wrong shape, device or option; overlapping or leaf logits with `inplace_backward`.
        IndexError: a scored label outside [0, V), on a CPU. A GPU asserts it where `TRITON_DEBUG=1` is set, and gives
            NaN otherwise.
    """
    return _logprobs(
        logits, labels, "none", None, None, None, ignore_index, shift, temperature, logit_scale, softcap, stats,
        inplace_backward, process_group,
    )  # fmt: skip


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
    """Log-prob of every sequence: the sum, or mean, of its scored tokens' log-probs, made in the same pass.

    Args:
        logits: (B, T, V); or packed, (N, V) or (1, N, V), with `cu_seqlens`. See `token_logprobs`.
        labels: (B, T); or packed, (N,) or (1, N).
        reduction: "sum", or "mean": divided by the sequence's number of scored tokens (0 where there is none).
        cu_seqlens: (S+1,) int32 or int64, rising from 0 to N: sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1].
            The shift never crosses a boundary.
        ld_alpha: α of LD-DPO (arXiv 2409.06411): the weight of the scored tokens past `shared_lengths`, which 0
            leaves out.
        shared_lengths: (S,) ints, with `ld_alpha`: how many scored tokens of each sequence weigh 1. None: the
            sequences are [chosen; rejected], and a pair shares the shorter one's number.
        ignore_index: as in `token_logprobs`, like every argument after it.
        shift: labels are aligned with `input_ids`.
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.
        stats: names of statistics; they are still per token, of the shape `token_logprobs` gives.
        inplace_backward: write the gradient over the logits.
        process_group: the ranks that hold the vocabulary's parts.

    Returns:
        (B,), or (S,) packed; float32 (float64 for float64 logits). With `stats`, a named tuple whose first field,
        `logprobs`, is that. The bits of a sequence's log-prob do not depend on the rest of the batch.

    Raises:
        TypeError: a wrong dtype, or an option of a wrong type.
        ValueError: a wrong shape, device or option; boundaries that do not rise from 0 to N (seen on a CPU).
        IndexError: a scored label outside [0, V), as in `token_logprobs`.
    """
    check_choice("reduction", reduction, REDUCTIONS[1:])
    ld_alpha = check_ld(ld_alpha, shared_lengths)
    return _logprobs(
        logits, labels, reduction, cu_seqlens, ld_alpha, shared_lengths, ignore_index, shift, temperature, logit_scale,
        softcap, stats, inplace_backward, process_group,
    )  # fmt: skip

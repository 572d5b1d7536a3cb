"""Log-probs from logits: one pass over the scored rows forward, one backward, no copy of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from fastpref._core.autograd import apply, once_differentiable
from fastpref._core.options import TOKENS, Reduction
from fastpref._core.resolve import LogitsBatch, named_result, resolve_logits, statistic_bits
from fastpref._core.sequences import ld_weights, reduce_sequences
from fastpref.distributed.logits import sharded_logprobs
from fastpref_kernels import ops
from fastpref_kernels.contract import LogprobsResult, Scoring, constant_statistics, statistic_gradient

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastpref._core.keywords import LogitsKeywords, SequenceKeywords
    from fastpref._core.results import Logprobs

assert ops  # importing it registers the operators


class _Logprobs(torch.autograd.Function):
    """Run `fastpref::logprobs` and its backward. The arguments are those of the operator, then `inplace`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.fastpref.logprobs(*arguments[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, cu_seqlens, weights, *scoring, reduction, stats, inplace = inputs
        result = LogprobsResult.of(output)
        reduced = reduction != "none"
        unused = result.logps if reduced else result.sequences
        constant = constant_statistics(result.statistics, stats)
        ctx.mark_non_differentiable(result.norm, result.counts, unused, *constant)
        ctx.set_materialize_grads(False)
        # The backward uses the copies of outputs in `norm`, because users may write to the outputs themselves.
        ctx.save_for_backward(logits, labels, cu_seqlens, weights, result.norm, result.counts)
        ctx.scoring, ctx.reduced, ctx.stats, ctx.inplace = (*scoring, reduction), reduced, stats, inplace

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_tokens, of_sequences, _, _, *of_statistics = grads
        grad = of_sequences if ctx.reduced else of_tokens
        grad_entropy = statistic_gradient(of_statistics, ctx.stats)
        none = (None,) * (len(ctx.needs_input_grad) - 1)
        if grad is None and grad_entropy is None:
            return (None, *none)
        arguments = (grad, grad_entropy, *ctx.saved_tensors, *ctx.scoring)
        if not ctx.inplace:
            return (torch.ops.fastpref.logprobs_backward(*arguments), *none)
        logits = ctx.saved_tensors[0]
        torch.ops.fastpref.logprobs_backward_(*arguments)
        # A kernel's writes do not advance the version counter. It is advanced here, so that every later use of the
        # logits raises.
        torch.autograd.graph.increment_version(logits)
        return (logits.detach(), *none)


def _score(batch: LogitsBatch, reduction: Reduction) -> Any:
    """Return the log-probs of tokens or sequences, with the statistics that the batch asks for."""
    logits, labels, cu_seqlens, shard, scoring, names, inplace, flat = batch
    bits = statistic_bits(names)
    if shard is not None:
        logps, statistics = sharded_logprobs(shard, logits, labels, cu_seqlens, scoring, bits, inplace)
        sequences = None if reduction.name == "none" else reduce_sequences(logps, batch.scored(), cu_seqlens, reduction)
    else:
        weights = None
        if reduction.ld_alpha is not None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            weights = ld_weights(batch.scored(), cu_seqlens, batch.sequences(), reduction, dtype)
        outputs = apply(_Logprobs, logits, labels, cu_seqlens, weights, *scoring, reduction.name, bits, inplace)
        logps, sequences, _, _, statistics = LogprobsResult.of(outputs)
    if sequences is None or reduction.name == "none":
        sequences = logps.view(-1) if flat else logps
    return named_result(batch, sequences, statistics)


@overload
def token_logprobs(
    logits: Tensor, labels: Tensor, *, stats: tuple[()] = ..., **keywords: Unpack[LogitsKeywords]
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor, labels: Tensor, *, stats: tuple[str, ...], **keywords: Unpack[LogitsKeywords]
) -> Logprobs: ...


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
    """Return the log-prob of each label under its logits: logp = z_y − log Σ_j exp z_j, in nats.

    The function reads the scored logits once and never copies, pads or widens them. It writes the gradient,
    ∂logp/∂z_j = 1[j = y] − softmax(z)_j, once, in the logits' dtype and full shape, with zeros where nothing is scored.

    z = softcap·tanh(logits·logit_scale/softcap)/temperature, each part optional (Gemma 2's soft cap, arXiv 2408.00118;
    Cohere's logit scale).

    Args:
        logits: (B, T, V), or (T, V) for one sequence; fp16, bf16, fp32 or fp64, any strides.
        labels: (B, T) or (T,), int64 or int32.
        ignore_index: the label of positions that are not scored. Their log-prob and gradient are 0, and their logits
            are not read.
        shift: True if `labels` are aligned with `input_ids`: logits[:, t] score labels[:, t+1]. False if they are
            already shifted: logits[:, t] score labels[:, t].
        temperature: divides the logits, last; above 0.
        logit_scale: multiplies the logits, first; above 0.
        softcap: None, or the cap of the logits' magnitude, above 0.
        stats: names of per-token statistics to compute in the same pass, 0 (or False) where not scored: "lse" (log Σ
            exp z), "entropy" (−Σ p log p, differentiable), "mean_logits" (the mean of z over the vocabulary), "is_top1"
            (whether the label is the first argmax), "log_sum_sq_probs" (log Σ p²), "top2_margin" (the largest z minus
            the second largest: 0 on a tie, +inf where V is 1).
        inplace_backward: write the gradient over the logits, which saves the memory of the gradient. A later use of the
            logits in a backward then raises an error, and a read of them returns the gradient.
        process_group: the ranks among which the vocabulary is split, in order, or a one-dimensional device mesh. Each
            rank passes the logits of its own columns, of any number. All ranks pass the same labels and get the same
            results. None: the logits are whole, or a DTensor that is `Shard(-1)` on one dimension of its mesh.

    Returns:
        A tensor (B, T−1), or (B, T) without `shift`; float32 (float64 for float64 logits), never above 0. With `stats`,
        a named tuple: `logprobs`, then the statistics, of the same shape, in the order of `stats`.

    Raises:
        TypeError: a dtype or the type of an option is wrong.
        ValueError: a shape, a device or an option is wrong; with `inplace_backward`, the logits overlap or are a leaf.
        IndexError: a scored label is outside [0, V), on a CPU. A GPU returns NaN for it, and with `TRITON_DEBUG=1`
            fails an assertion.
    """
    scoring = Scoring(ignore_index, shift, logit_scale, temperature, softcap)
    batch = resolve_logits(
        logits, labels, None, scoring, stats=stats, inplace=inplace_backward, process_group=process_group
    )
    return _score(batch, TOKENS)


@overload
def sequence_logprobs(
    logits: Tensor, labels: Tensor, *, stats: tuple[()] = ..., **keywords: Unpack[SequenceKeywords]
) -> Tensor: ...


@overload
def sequence_logprobs(
    logits: Tensor, labels: Tensor, *, stats: tuple[str, ...], **keywords: Unpack[SequenceKeywords]
) -> Logprobs: ...


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
    """Return the log-prob of each sequence: the sum, or the mean, of its scored tokens' log-probs.

    Args:
        logits: (B, T, V); or packed, (N, V) or (1, N, V), with `cu_seqlens`. See `token_logprobs`.
        labels: (B, T); or packed, (N,) or (1, N).
        reduction: "sum", or "mean": divided by the sequence's number of scored tokens (0 where there is none).
        cu_seqlens: (S+1,) int32 or int64, rising from 0 to N: sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1].
            The shift never crosses a boundary.
        ld_alpha: α of LD-DPO (arXiv 2409.06411), the weight of the scored tokens past `shared_lengths`. At 0 they are
            left out.
        shared_lengths: (S,) ints, with `ld_alpha`: the number of scored tokens of each sequence that weigh 1. None: the
            sequences are [chosen; rejected], and each pair shares the shorter one's number.
        ignore_index: as in `token_logprobs`, like every argument after it.
        shift: whether labels are aligned with `input_ids`.
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.
        stats: names of statistics, which are per token here too.
        inplace_backward: write the gradient over the logits.
        process_group: the ranks among which the vocabulary is split.

    Returns:
        A tensor (B,), or (S,) if packed; float32 (float64 for float64 logits). With `stats`, a named tuple whose first
        field, `logprobs`, is this tensor. The bits of a sequence's log-prob do not depend on the rest of the batch.

    Raises:
        TypeError: a dtype or the type of an option is wrong.
        ValueError: a shape, a device or an option is wrong; on a CPU, boundaries do not rise from 0 to N.
        IndexError: a scored label is outside [0, V), as in `token_logprobs`.
    """
    over = Reduction.checked(reduction, ld_alpha, shared_lengths)
    scoring = Scoring(ignore_index, shift, logit_scale, temperature, softcap)
    batch = resolve_logits(
        logits, labels, cu_seqlens, scoring, stats=stats, inplace=inplace_backward, process_group=process_group
    )
    return _score(batch, over)

"""Resolve the arguments of the public functions to plain tensors, checked options, and one layout of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._core.autograd import enter
from fastpref._core.checks import (
    autocasts,
    check_bool,
    check_linear,
    check_logits,
    check_scoring,
    check_transform,
    remembered,
)
from fastpref._core.options import LinearOptions, replaced
from fastpref._core.results import LINEAR_STATISTICS, check_stats, result_type
from fastpref._core.rows import UNKNOWN, ScoredRows, resolve_rows
from fastpref._core.sequences import count_sequences
from fastpref._core.sharding import Shard, local_head, local_logits
from fastpref_kernels import contract
from fastpref_kernels.contract import Scoring, scored_targets


@remembered
def resolve_scoring(
    ignore_index: int, shift: bool, logit_scale: float, temperature: float, softcap: float | None
) -> Scoring:
    """Return the scoring with plain numbers, or raise `TypeError` or `ValueError` for a wrong option."""
    ignore_index = check_scoring(ignore_index, shift)
    temperature, logit_scale, softcap = check_transform(temperature, logit_scale, softcap)
    return Scoring(ignore_index, shift, logit_scale, temperature, softcap)


def statistic_bits(names: Sequence[str]) -> int:
    """Return the bits of the named statistics."""
    bits = 0
    for name in names:
        bits |= contract.LINEAR_STATISTICS[name].value
    return bits


def asked_statistics(batch: LogitsBatch | LinearBatch, statistics: Sequence[Tensor]) -> list[Tensor]:
    """Select the statistics that a batch asks for from an operator's, in the order of the batch's names."""
    places = [contract.PLACE[contract.LINEAR_STATISTICS[name]] for name in batch.stats]
    return [statistics[place].view(-1) if batch.flat else statistics[place] for place in places]


def named_result(batch: LogitsBatch | LinearBatch, result: Tensor, statistics: Sequence[Tensor]) -> Any:
    """Return a result alone, or in a named tuple followed by the statistics that a batch asks for."""
    if not batch.stats:
        return result
    return result_type(batch.stats)(result, *asked_statistics(batch, statistics))


class LogitsBatch(NamedTuple):
    """Logits and labels of a batch, checked.

    Attributes:
        logits: (B, T, V).
        labels: (B, T).
        cu_seqlens: None, or the packed boundaries (S+1,), with B = 1.
        shard: this rank's part of the vocabulary, or None for the whole.
        scoring: which labels are scored, on which transform of the logits.
        stats: names of the statistics that are asked for.
        inplace: whether the gradient is written over the logits.
        flat: whether the caller gave labels (T,) without a batch dimension.
    """

    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    shard: Shard | None
    scoring: Scoring
    stats: tuple[str, ...]
    inplace: bool
    flat: bool

    def scored(self) -> Tensor:
        """Return whether each position (B, T') is scored."""
        ignore_index, shift = self.scoring.ignore_index, self.scoring.shift
        return scored_targets(self.labels, self.cu_seqlens, ignore_index=ignore_index, shift=shift)[1]

    def sequences(self) -> int:
        """Return the number of sequences."""
        return count_sequences(self.labels, self.cu_seqlens)


def resolve_logits(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    scoring: Scoring,
    *,
    stats: tuple[str, ...],
    inplace: bool,
    process_group: Any,
) -> LogitsBatch:
    """Check the arguments of the functions that take logits, and bring them to one layout."""
    check_bool("inplace_backward", inplace)
    logits, labels, shard = local_logits(logits, labels, process_group, inplace)
    check_logits(logits, labels, cu_seqlens, sharded=shard is not None)
    logits, labels = enter(logits, labels)
    scoring = resolve_scoring(*scoring)
    names = check_stats(stats)
    flat = labels.dim() == 1
    if inplace:
        check_inplace(logits)
    if logits.dim() == 2:
        logits = logits[None]
    return LogitsBatch(logits, labels[None] if flat else labels, cu_seqlens, shard, scoring, names, inplace, flat)


def _overlaps(logits: Tensor) -> bool:
    """Return whether elements of a strided tensor may share memory: a stride is within the span of smaller ones."""
    axes = [(stride, size, axis) for axis, (stride, size) in enumerate(zip(logits.stride(), logits.shape, strict=True))]
    for stride, size, axis in axes:
        # The strides are compared one by one, not sorted: in a compiled graph of dynamic shapes they are symbols.
        smaller = [(s, n) for s, n, other in axes if s < stride or (s == stride and other < axis)]
        if size > 1 and stride < 1 + sum(s * (n - 1) for s, n in smaller):
            return True
    return False


def check_inplace(logits: Tensor) -> None:
    """Raise `ValueError` unless a gradient can be written over these logits."""
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


class Operands(NamedTuple):
    """The tensors whose product gives the logits: hidden states, the head's weight, and its bias or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class LinearBatch(NamedTuple):
    """Hidden states, a head and labels of a batch, checked.

    Attributes:
        hidden: (B, T, H).
        weight: (V, H), or this rank's rows of it.
        bias: (V,), or this rank's part of it, or None.
        labels: (B, T).
        scored: (B, T') bool, whether each position is scored.
        cu_seqlens: None, or the packed boundaries (S+1,), with B = 1.
        shard: this rank's part of the vocabulary, or None for the whole.
        scoring: which labels are scored, on which transform of the logits.
        options: how the log-probs are computed.
        stats: names of the statistics that are asked for.
        dtype: the dtype in which the operands are multiplied.
        rows: the number of scored rows, as far as the host knows it.
        flat: whether the caller gave labels (T,) without a batch dimension.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scored: Tensor
    cu_seqlens: Tensor | None
    shard: Shard | None
    scoring: Scoring
    options: LinearOptions
    stats: tuple[str, ...]
    dtype: torch.dtype
    rows: ScoredRows
    flat: bool

    sequences = LogitsBatch.sequences

    def columns(self) -> int | Tensor:
        """Return the size of the whole vocabulary; a tensor if only the ranks of a group together know it."""
        return self.weight.shape[0] if self.shard is None else self.shard.bounds[1]

    def wide(self) -> torch.dtype:
        """Return the dtype of the log-probs."""
        return torch.promote_types(self.dtype, torch.float32)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which operands are multiplied: autocast's where it is on, else their own."""
    if autocasts(hidden.device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def resolve_linear(
    operands: Operands,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    scoring: Scoring,
    options: LinearOptions,
    *,
    stats: tuple[str, ...],
    process_group: Any,
    prefix: str = "",
) -> LinearBatch:
    """Check the arguments of the functions that take hidden states, and bring them to one layout.

    The host reads no values here; `count_rows` does so later.

    Args:
        operands: plain tensors or DTensors.
        labels: (B, T), (T,), or packed.
        cu_seqlens: None, or the packed boundaries (S+1,).
        scoring: unchecked.
        options: unchecked.
        stats: names of statistics, unchecked.
        process_group: the ranks that hold the vocabulary's parts, or None.
        prefix: the prefix of the caller's names of the operands.
    """
    hidden, weight, bias, labels, shard = local_head(*operands, labels, process_group)
    check_linear(hidden, weight, labels, bias, cu_seqlens, prefix=prefix, sharded=shard is not None)
    hidden, weight, bias, labels = enter(hidden, weight, bias, labels)
    scoring = resolve_scoring(*scoring)
    flat = labels.dim() == 1
    labels = labels[None] if flat else labels
    ignore_index, shift = scoring.ignore_index, scoring.shift
    return LinearBatch(
        hidden=hidden[None] if hidden.dim() == 2 else hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        scored=scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)[1],
        cu_seqlens=cu_seqlens,
        shard=shard,
        scoring=scoring,
        options=options.checked(),
        stats=check_stats(stats, LINEAR_STATISTICS),
        dtype=_compute_dtype(hidden),
        rows=UNKNOWN,
        flat=flat,
    )


def count_rows(batch: LinearBatch, scored_rows: Any, vocabulary: int | Tensor | None = None) -> LinearBatch:
    """Count the scored rows and check the labels with one read on the host, and return the batch with the count.

    Args:
        batch: the batch.
        scored_rows: the caller's number, or None.
        vocabulary: the number of columns, which bounds the labels; None for the batch's own.
    """
    vocabulary = batch.columns() if vocabulary is None else vocabulary
    known = resolve_rows(scored_rows, batch.labels, batch.cu_seqlens, vocabulary, batch.scoring)
    return batch if known.total is None else replaced(batch, rows=known)  # nothing is known of a batch before this

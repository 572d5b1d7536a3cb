"""Preference losses from hidden states: `linear_logprobs` computes log-probs, and a loss is computed from these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpref.reference.gather import whole
from fastpref.reference.linear_logprobs import linear_sequence_logprobs
from fastpref.reference.losses.preference import dpo_loss
from fastpref.reference.losses.reduction import reduce
from fastpref.reference.results import LinearGroupLoss, LinearPreferenceLoss, linear_group_type, linear_loss_type
from fastpref.reference.sequences import count_scored, number_sequences, score

LossFunction = Callable[[Tensor], Tensor]
"""A function from log-probs (G, K) to losses (G,), in which each loss depends on its own group only."""


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
) -> LinearPreferenceLoss:
    """Compute `fastpref.linear_dpo_loss` in plain PyTorch.

    Raises:
        ValueError: as `fastpref.reference.sequence_logprobs` and `fastpref.reference.dpo_loss` do.
        IndexError: a scored label outside [0, V).
    """
    labels = whole(labels)
    logprobs = partial(
        linear_sequence_logprobs,
        reduction="mean" if average_logps else "sum",
        cu_seqlens=cu_seqlens,
        ld_alpha=ld_alpha,
        shared_lengths=shared_lengths,
        process_group=process_group,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref_chosen_logps, ref_rejected_logps = logprobs(ref_hidden, ref_weight, labels, ref_bias).tensor_split(2)
    logps, statistics = _detached(logprobs(hidden, weight, labels, bias, stats=stats))
    chosen, rejected = logps.tensor_split(2)

    numbers, sequences = number_sequences(labels, cu_seqlens)
    _, scored, numbers = score(labels, numbers, ignore_index=ignore_index, shift=shift)
    chosen_counts, rejected_counts = count_scored(scored, numbers, sequences).tensor_split(2)
    loss = dpo_loss(
        chosen,
        rejected,
        None if ref_chosen_logps is None else ref_chosen_logps.detach().to(chosen.dtype),
        None if ref_rejected_logps is None else ref_rejected_logps.detach().to(chosen.dtype),
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        reduction=reduction,
        chosen_lengths=chosen_counts if chosen_lengths is None else chosen_lengths,
        rejected_lengths=rejected_counts if rejected_lengths is None else rejected_lengths,
        length_normalize=length_normalize,
        margin=margin,
        weights=weights,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        reference_free=reference_free,
        delta=delta,
        gamma=gamma,
        discopop_tau=discopop_tau,
        sft_weight=sft_weight,
        sft_reduction=sft_reduction,
    )
    return linear_loss_type(tuple(stats))(*loss, chosen.detach(), rejected.detach(), *statistics)


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
) -> LinearGroupLoss:
    """Compute `fastpref.linear_preference_loss` in plain PyTorch.

    Raises:
        ValueError: an unknown reduction, and as `fastpref.reference.sequence_logprobs` does.
        IndexError: a scored label outside [0, V).
    """
    result = linear_sequence_logprobs(
        hidden,
        weight,
        labels,
        bias,
        reduction="mean" if average_logps else "sum",
        cu_seqlens=cu_seqlens,
        ld_alpha=ld_alpha,
        shared_lengths=shared_lengths,
        process_group=process_group,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=stats,
    )
    logps, statistics = _detached(result)
    # Sequence k·G + g is member k of group g.
    members = logps.view(group_size, logps.shape[0] // group_size).T
    return linear_group_type(tuple(stats))(reduce(loss_fn(members), reduction), members.detach(), *statistics)


def _detached(result: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the log-probs of a result, and its statistics, detached."""
    if isinstance(result, Tensor):
        return result, ()
    return result[0], tuple(value.detach() for value in result[1:])

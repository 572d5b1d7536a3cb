"""Preference losses from hidden states, with the gradients computed in the forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref._core.checks import REDUCTIONS, check_bool, check_choice, check_ld
from fastpref._core.group_loss import Groups, group_loss
from fastpref._core.groups import LossFunction, Reference, check_group, check_halves, resolve_pair_options
from fastpref._core.options import LinearOptions, Reduction, replaced
from fastpref._core.preference import PreferenceOptions
from fastpref._core.resolve import Operands, asked_statistics, count_rows, resolve_linear
from fastpref._core.results import LinearGroupLoss, LinearPreferenceLoss, linear_group_type, linear_loss_type
from fastpref._core.rows import smaller
from fastpref.linear_logprobs import score
from fastpref.losses.preference import pair_loss
from fastpref_kernels.contract import Scoring


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
    """Return `dpo_loss` of the log-probs of `linear_sequence_logprobs`, and compute the gradients in the forward.

    The forward computes the loss and, if a backward may follow, the required gradients of hidden, weight and bias, in
    6·N·V·H flops for N scored rows, with the exponentials of one chunk of pairs in memory at a time. The backward
    multiplies the gradients by the upstream gradient. Where all pairs fit in one chunk, the forward keeps its
    exponentials and the backward computes the gradients from them. This takes as many flops, and no float32 buffer for
    the weight's gradient.

    Args:
        hidden: (2B, T, H) = [chosen; rejected]; or packed with `cu_seqlens`, the first half of the sequences chosen.
        weight: (V, H), hidden's dtype.
        labels: (2B, T), or packed.
        ref_chosen_logps: (B,) log π_ref(chosen|x), a constant; not with `ref_hidden`.
        ref_rejected_logps: (B,) log π_ref(rejected|x), likewise.
        bias: None, or (V,).
        ref_hidden: the hidden states of the reference model, of hidden's leading shape. The same labels and options
            score them, without gradients. Pass `ref_weight` too, and `ref_bias` if the head has one.
        ref_weight: (V, H) of the reference model.
        ref_bias: (V,) of the reference model.
        average_logps: take the mean of a sequence's token log-probs instead of their sum.
        stats: names of token statistics, as in `linear_token_logprobs`. They follow the other results, detached.
        cu_seqlens: as in `sequence_logprobs`, like the two after it.
        ld_alpha: α of LD-DPO.
        shared_lengths: (2B,) ints, with `ld_alpha`.
        beta: as in `dpo_loss`, like every argument down to `sft_reduction`.
        loss_type: a loss type, a sequence of loss types, or a mapping of loss types to their weights.
        loss_weights: one weight for each of a sequence of loss types.
        label_smoothing: ε.
        reduction: "mean", "sum" or "none".
        chosen_lengths: (B,); None: the numbers of scored labels.
        rejected_lengths: (B,); likewise.
        length_normalize: divide by the lengths. With it, with the types that always divide, and with the likelihood
            term, `average_logps` is an error: they need sums.
        margin: m.
        weights: (B,), a factor of each pair's loss.
        f_divergence: which divergence.
        f_alpha: its α.
        reference_free: take the reference's log-probs as 0.
        delta: δ of `bco_pair`.
        gamma: γ of `simpo`.
        discopop_tau: τ of `discopop`.
        sft_weight: the weight of the chosen completions' negative log-likelihood, which is added.
        sft_reduction: how the likelihood is divided.
        mode: "auto" computes the gradients in the forward. With `reduction="none"`, float16, a loss that mixes pairs
            (`aot`, `aot_unpaired`), or a pair with more scored rows than a chunk, it computes the log-probs first, and
            the products again in the backward. This takes 8·N·V·H flops and gives the same results. "save" and
            "recompute" always compute the log-probs first, as `linear_token_logprobs` does.
        chunk_rows: the most scored rows whose exponentials are kept at a time. None: as many as fill 80 MiB on a CPU, 1
            GiB on a GPU.
        filter_eps: as in `linear_token_logprobs`, like every argument after it.
        scored_rows: the number of scored labels, if the caller knows it. For a batch of several chunks, pass a number
            for each sequence: with an int, the host must read where the chunks begin.
        process_group: the ranks among which the vocabulary is split, also that of `ref_weight` unless it is a DTensor.
        ignore_index: the label that is not scored.
        shift: whether labels are aligned with `input_ids`.
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.

    Returns:
        A named tuple: loss, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps, then `stats`. All but the
        loss are detached; rewards and log-probs are (B,).

    Raises:
        TypeError: a dtype or the type of an option is wrong.
        ValueError: a shape, a device or an option is wrong; the reference is given twice, or not at all.
        IndexError: a scored label is outside [0, V). A GPU checks this only where `scored_rows` is None.
    """
    scoring = Scoring(ignore_index, shift, logit_scale, temperature, softcap)
    linear = LinearOptions(mode, chunk_rows, filter_eps)
    common: dict[str, Any] = {"cu_seqlens": cu_seqlens, "scoring": scoring, "process_group": process_group}
    batch = resolve_linear(Operands(hidden, weight, bias), labels, options=linear, stats=stats, **common)
    check_halves(batch.labels, cu_seqlens)
    options = PreferenceOptions(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        reduction=reduction,
        length_normalize=length_normalize,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        reference_free=reference_free,
        delta=delta,
        gamma=gamma,
        discopop_tau=discopop_tau,
        sft_weight=sft_weight,
        sft_reduction=sft_reduction,
        margin=margin,
        weights=weights,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    preference = resolve_pair_options(options, batch, average_logps)
    reference = Reference(ref_chosen_logps, ref_rejected_logps, ref_hidden, ref_weight, ref_bias)
    reference.check(batch, preference.needs_reference)
    over = Reduction("mean" if average_logps else "sum", check_ld(ld_alpha, shared_lengths), shared_lengths)
    ref = None
    if reference.hidden is not None and reference.weight is not None:
        again = replaced(linear, mode="recompute")
        ref = resolve_linear(reference.operands(), labels, options=again, stats=(), prefix="ref_", **common)
    if ref is None or not preference.needs_reference:
        batch = count_rows(batch, scored_rows)
    else:
        # One read serves both models, because a label must be in the smaller vocabulary.
        batch = count_rows(batch, scored_rows, smaller(batch.columns(), ref.columns()))
        with torch.no_grad():
            ref_logps, _ = score(replaced(ref, rows=batch.rows), over)
        ref_chosen, ref_rejected = ref_logps.tensor_split(2)
        reference = replaced(reference, chosen_logps=ref_chosen, rejected_logps=ref_rejected)
    ref_chosen, ref_rejected = (
        None if logps is None or not preference.needs_reference else logps.detach().to(batch.wide())
        for logps in (reference.chosen_logps, reference.rejected_logps)
    )
    per_pair = preference.replace(reduction="none")

    def pair_losses(members: Tensor) -> Tensor:
        chosen, rejected = members.unbind(1)
        return pair_loss((chosen, rejected, ref_chosen, ref_rejected), per_pair).loss

    pairs = Groups(2, over, reduction, mixes=preference.mixes_pairs)
    loss, logps, statistics = group_loss(batch, pair_losses, pairs)
    chosen, rejected = logps.tensor_split(2)
    rewards = (
        preference.options.beta * (policy if ref_logps is None else policy - ref_logps)
        for policy, ref_logps in ((chosen, ref_chosen), (rejected, ref_rejected))
    )
    return linear_loss_type(batch.stats)(loss, *rewards, chosen, rejected, *asked_statistics(batch, statistics))


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
    """Return any loss of groups of K sequences from hidden states, and compute the gradients in the forward.

    K-way DPO, for one, is `loss_fn=lambda logps: ranking_loss(implicit_reward(logps, ref), ranks, reduction="none")`.

    Args:
        hidden: (K·G, T, H), member-major: sequence k·G + g is member k of group g; or packed with `cu_seqlens`.
        weight: (V, H), hidden's dtype.
        labels: (K·G, T), or packed.
        loss_fn: a function of sequence log-probs (G, K) that returns losses (G,), each of which depends on its own row
            only. It is called once for each chunk, with zeros for the groups of other chunks. Only its argument is
            differentiated, so everything that it closes over must be constant.
        bias: None, or (V,).
        group_size: K.
        reduction: "mean" over G, "sum", or "none" for (G,). The mean of no groups is 0.
        average_logps: as in `linear_dpo_loss`, like every argument after it.
        stats: statistics of the tokens.
        cu_seqlens: packed boundaries.
        ld_alpha: α of LD-DPO; without `shared_lengths` for pairs only.
        shared_lengths: (K·G,) ints, with `ld_alpha`.
        mode: how and when the gradients are computed.
        chunk_rows: the most scored rows whose exponentials are kept at a time.
        filter_eps: the softmax mass below which columns are left out of the gradient.
        scored_rows: the number of scored labels, if the caller knows it.
        process_group: the ranks among which the vocabulary is split.
        ignore_index: the label that is not scored.
        shift: whether labels are aligned with `input_ids`.
        temperature: divides the logits.
        logit_scale: multiplies the logits.
        softcap: caps the logits.

    Returns:
        A named tuple: loss, logps (G, K) detached, then `stats`.

    Raises:
        TypeError: a dtype or the type of an option is wrong.
        ValueError: a shape, a device or an option is wrong; the losses are not (G,), or depend on a tensor besides the
            log-probs that requires a gradient. `torch.compile` takes such a tensor for a constant.
        IndexError: a scored label is outside [0, V). A GPU checks this only where `scored_rows` is None.
    """
    scoring = Scoring(ignore_index, shift, logit_scale, temperature, softcap)
    options = LinearOptions(mode, chunk_rows, filter_eps)
    operands = Operands(hidden, weight, bias)
    batch = resolve_linear(operands, labels, cu_seqlens, scoring, options, stats=stats, process_group=process_group)
    check_choice("reduction", reduction, REDUCTIONS)
    check_bool("average_logps", average_logps)
    ld_alpha = check_ld(ld_alpha, shared_lengths)
    size = check_group(batch.labels, cu_seqlens, group_size, ld_alpha, shared_lengths)
    over = Reduction("mean" if average_logps else "sum", ld_alpha, shared_lengths)
    batch = count_rows(batch, scored_rows)
    loss, logps, statistics = group_loss(batch, loss_fn, Groups(size, over, reduction))
    members = logps.view(size, logps.shape[0] // size).T
    return linear_group_type(batch.stats)(loss, members, *asked_statistics(batch, statistics))

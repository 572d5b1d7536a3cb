"""Preference losses on sequence log-probs, for training loops.

On a CPU the reference formula runs: a (B,) tensor is too small for another kernel to be faster. A GPU computes the
loss, the rewards and the partial derivatives of a loss type in one launch (`aot` sorts in another), and the backward is
one multiplication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastpref._core.checks import (
    FLOATING,
    check_positive,
    check_same_device,
    check_tensor,
    describe,
    shape_error,
)
from fastpref._core.options import by_name
from fastpref._core.preference import PairLogps, Preference, PreferenceOptions, Term, check_kto, resolve_pairs
from fastpref.losses._launch import fused, launch
from fastpref.reference.losses import preference as formula
from fastpref.reference.results import KTOResult, PreferenceLoss

__all__ = ["dpo_loss", "implicit_reward", "kto_loss", "wpo_weights"]


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
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
) -> PreferenceLoss:
    """Return the loss and the implicit rewards of B pairs: DPO and its family, from summed log-probs.

    Let w and l be the log-probs of the chosen and the rejected completion, rw and rl those under the reference,
    Δw = w − rw, Δl = l − rl, h = Δw − Δl, u = βh − margin and ε = `label_smoothing`. The loss type `sigmoid` is
    −(1−ε) log σ(u) − ε log σ(−u), which is DPO (arXiv 2305.18290, eq. 7), or conservative DPO where ε > 0.
    `fastpref.losses.LOSS_TYPES` has the formula, derivative, paper and options of every type.

    An option that none of the given types takes is an error. With several types, an option applies to those that take
    it.

    Args:
        policy_chosen_logps: (B,) log π(chosen|x), nats, any floating dtype; computed in float32 (float64 for float64).
        policy_rejected_logps: (B,) log π(rejected|x).
        ref_chosen_logps: (B,) log π_ref(chosen|x). It may be None with `reference_free`, and for the types that have no
            reference (`simpo`, `cpo`, `orpo`, `sft`), which ignore it.
        ref_rejected_logps: (B,) log π_ref(rejected|x), or None like `ref_chosen_logps`.
        beta: β > 0, the strength of the KL constraint.
        loss_type: a name in `fastpref.losses.LOSS_TYPES`; a sequence of names, whose losses are added; or a mapping of
            names to weights, whose weighted losses are added.
        loss_weights: one weight for each of a sequence of loss types. None stands for 1 each, or for the weights of the
            mapping.
        label_smoothing: ε in [0, 1], the probability that the label of a pair is flipped; below ½ for `robust`, between
            0 and 1 for `exo_pair`.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no pairs is 0. The `aot` types sort the pairs:
            with "none", element k is the loss of the k-th smallest values.
        chosen_lengths: (B,) numbers of tokens of the chosen completions, for types and options that divide by them. A
            length of 0 divides by 1.
        rejected_lengths: (B,) numbers of tokens of the rejected completions.
        length_normalize: divide by the lengths before comparing: w, rw and Δw by n_w; l, rl and Δl by n_l. `simpo`,
            `orpo` and `sigmoid_norm` always do so.
        margin: None, a number, or (B,), floating point or integers: how far apart u should at least be (ODPO, arXiv
            2402.10571). It gets no gradient.
        weights: None, or (B,), floating point or integers. They multiply the losses of the pairs, except for `sft`; the
            mean still divides by B. They get no gradient. `wpo_weights` computes those of WPO (arXiv 2406.11827).
        f_divergence: "reverse_kl" (DPO), "forward_kl" (1 − e^{−Δ}), "js" (log 2 + log σ(Δ)) or "alpha"
            ((e^{(α−1)Δ} − 1)/(α−1)). It replaces Δw and Δl before they are divided by lengths (arXiv 2309.16240).
        f_alpha: α of `f_divergence="alpha"`, which is "reverse_kl" at α = 1.
        reference_free: take the log-probs of the reference as 0, in the rewards too, even where they are given.
        delta: δ of `bco_pair`, the reward that separates chosen from rejected.
        gamma: γ of `simpo`, its target margin.
        discopop_tau: τ > 0 of `discopop`.
        sft_weight: the factor, 0 or more, of the negative log-likelihood of the chosen completions, which is added.
        sft_reduction: the mean of that term and of the type `sft`: "token" for −Σ w / Σ n_w over the batch, "sequence"
            for −mean(w / n_w).

    Returns:
        PreferenceLoss(loss, chosen_rewards, rejected_rewards). The rewards are β(w − rw) and β(l − rl), detached and
        (B,), whatever the reduction, the divergence and the lengths.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, an option is out of range or taken by none of the loss types, or the
            log-probs of the reference or the lengths are missing.
    """
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
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return pair_loss(logps, resolve_pairs(logps, options))


def pair_loss(logps: PairLogps, preference: Preference) -> PreferenceLoss:
    """Compute `dpo_loss` of log-probs and options that have been checked.

    The log-probs of the reference may be None where the loss does not need them.
    """
    options = preference.options
    # A launch computes one gradient per pair. With losses that mix pairs and no reduction, a pair has gradients from
    # two losses.
    if not fused(logps[0]) or (options.reduction == "none" and preference.mixes_pairs):
        return formula.dpo_loss(*logps, **by_name(options))
    results = [_launch_term(logps, options, term) for term in preference.terms]
    loss = results[0][0]
    for result in results[1:]:
        loss = loss + result[0]
    return PreferenceLoss(loss, *results[0][1:])


def _launch_term(logps: PairLogps, options: PreferenceOptions, term: Term) -> tuple[Tensor, ...]:
    """Launch one term of the loss, and return its loss and the rewards."""
    chosen, rejected, ref_chosen, ref_rejected = logps
    tensors = (
        chosen,
        rejected,
        ref_chosen if term.uses_reference else None,
        ref_rejected if term.uses_reference else None,
        options.chosen_lengths,
        options.rejected_lengths,
        _floating(options.margin, chosen) if "margin" in term.kind.takes else None,
        _floating(options.weights, chosen) if "weights" in term.kind.takes else None,
    )
    scalars = (
        term.kind.name,
        term.weight,
        options.beta,
        term.label_smoothing,
        term.margin,
        term.length_normalize,
        term.f_divergence,
        options.f_alpha,
        options.delta,
        options.gamma,
        options.discopop_tau,
        term.sft_weight,
        options.sft_reduction,
    )
    return launch("dpo_loss", options.reduction, tensors, scalars)


def _floating(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Return a tensor as floating point, and None for a number or None."""
    if not isinstance(value, Tensor):
        return None
    return value if value.is_floating_point() else value.to(torch.promote_types(like.dtype, torch.float32))


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> KTOResult:
    """Return the loss and the implicit rewards of B unpaired answers: KTO (arXiv 2402.01306).

    With Δ = log π − log π_ref and z = max(0, mean of `kl`), the loss of a desirable answer is λ_d[1 − σ(β(Δ − z))], and
    that of any other answer is λ_u[1 − σ(β(z − Δ))].

    Args:
        policy_logps: (B,) log π(y|x), nats, any floating dtype; computed in float32 (float64 for float64).
        ref_logps: (B,) log π_ref(y|x).
        desirable: (B,) bool, True for a desirable answer.
        kl: estimates of KL(π‖π_ref): a number, () or (K,) with any K, such as Δ of prompts with the answers to others.
            It gets no gradient.
        beta: β > 0.
        desirable_weight: λ_d ≥ 0.
        undesirable_weight: λ_u ≥ 0.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no answers is 0.

    Returns:
        KTOResult(loss, rewards). The rewards are βΔ, detached and (B,).

    Raises:
        TypeError: a tensor has a wrong dtype, or an option has a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    logps = (policy_logps, ref_logps, desirable)
    kl, *numbers = check_kto(logps, kl, beta, desirable_weight, undesirable_weight, reduction)
    if not fused(policy_logps):
        beta, desirable_weight, undesirable_weight = numbers
        return formula.kto_loss(
            *logps,
            kl=kl,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            reduction=reduction,
        )
    estimates, constant = (kl, 0.0) if isinstance(kl, Tensor) else (None, kl)
    return KTOResult(*launch("kto_loss", reduction, (*logps, estimates), (constant, *numbers)))


def wpo_weights(logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the weights of pairs of WPO (arXiv 2406.11827), for the `weights` of `dpo_loss`.

    The weight of a pair is Π exp(mean_t(logp_t − log Σ_j p_j²)) over its two completions. It says how likely the policy
    is to have written them, with each token compared to one that the policy samples itself.

    Args:
        logps: (2B, T) token log-probs in nats, [chosen; rejected], any floating dtype.
        log_sum_sq_probs: (2B, T), the statistic of this name of `token_logprobs`.
        mask: (2B, T) bool, True where a token counts.

    Returns:
        (B,) weights, detached, float32 (float64 for float64). A completion in which no token counts has the factor 1.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes or devices differ, or the number of sequences is odd.
    """
    check_tensor("logps", logps, FLOATING, "a floating-point tensor (2B, T)")
    check_tensor("log_sum_sq_probs", log_sum_sq_probs, FLOATING, "a floating-point tensor (2B, T)")
    check_tensor("mask", mask, (torch.bool,), "a bool tensor (2B, T)")
    if logps.dim() != 2 or logps.shape[0] % 2:
        raise ValueError(f"logps must be (2B, T), [chosen; rejected]; got {describe(logps)}")
    for name, value in (("log_sum_sq_probs", log_sum_sq_probs), ("mask", mask)):
        if value.shape != logps.shape:
            raise ValueError(f"{name} must have logps' shape {tuple(logps.shape)}; got {describe(value)}")
        check_same_device(name, value, "logps", logps)
    return formula.wpo_weights(logps, log_sum_sq_probs, mask)


def implicit_reward(logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """Return the reward that a policy implies, β(log π − log π_ref) (arXiv 2305.18290, eq. 5).

    It leaves out β log Z, which all answers to a prompt share.

    Args:
        logps: log π(y|x), nats, any shape, any floating dtype; computed in float32 (float64 for float64).
        ref_logps: log π_ref(y|x), of the same shape.
        beta: β > 0.

    Returns:
        Rewards of logps' shape, float32 (float64 for float64), differentiable in both.

    Raises:
        TypeError: a tensor is not floating point, or β is not a number.
        ValueError: the shapes or devices differ, or β is not above 0.
    """
    check_tensor("logps", logps, FLOATING, "a floating-point tensor")
    check_tensor("ref_logps", ref_logps, FLOATING, "a floating-point tensor")
    if logps.shape != ref_logps.shape:
        # The tensor with more dimensions is the one to change.
        if logps.dim() > ref_logps.dim():
            raise shape_error("logps", logps, f"of ref_logps' shape, {tuple(ref_logps.shape)}", ref_logps.dim())
        raise shape_error("ref_logps", ref_logps, f"of logps' shape, {tuple(logps.shape)}", logps.dim())
    check_same_device("ref_logps", ref_logps, "logps", logps)
    return formula.implicit_reward(logps, ref_logps, beta=check_positive("beta", beta))

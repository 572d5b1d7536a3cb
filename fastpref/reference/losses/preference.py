"""Preference losses on sequence log-probs: the definitions, which are also what runs on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._checks import (
    FLOATING,
    INTEGER,
    REDUCTIONS,
    check_bool,
    check_choice,
    check_finite,
    check_positive,
    check_same_device,
    check_tensor,
    check_vector,
    describe,
    is_like,
    is_sequence,
    remembered,
    shape_error,
)
from fastpref._results import KTOResult, PreferenceLoss
from fastpref.reference.losses.loss_types import F_DIVERGENCES, LOSS_TYPES, LossType, Pairs, under_divergence

SFT_REDUCTIONS = ("token", "sequence")
NUMBERS = (*FLOATING, *INTEGER)
Weighted = tuple[tuple[LossType, float], ...]
"""Loss types, each with its weight."""


class Numbers(NamedTuple):
    """`dpo_loss`'s options that are numbers, as floats."""

    beta: float
    label_smoothing: float
    f_alpha: float
    delta: float
    gamma: float
    discopop_tau: float
    sft_weight: float


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """(B,) -> (B,), its sum, or its mean; a mean over nothing is 0."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" and losses.numel() else losses.sum()


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, float32 at the least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple([tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors])


def check_vectors(**named: Tensor | None) -> None:
    """Raise unless every given tensor is floating point, (B,) with one B, and on one device."""
    like = None
    for name, value in named.items():
        if value is None:
            continue
        if like is None or not is_like(value, like[1]):
            check_vector(name, value, FLOATING, "a floating-point tensor (B,)", like)
        like = like or (name, value)


def check_of_pairs(name: str, value: Tensor, like: tuple[str, Tensor]) -> Tensor:
    """Check a number for each pair, (B,), which may be an integer, and return it as floating point.

    Args:
        name: the argument's name.
        value: the argument.
        like: the name and the tensor of log-probs or rewards (B,) that it belongs to.
    """
    check_vector(name, value, NUMBERS, "a floating-point or integer tensor (B,)", like)
    return value if value.is_floating_point() else value.to(torch.promote_types(like[1].dtype, torch.float32))


def check_margin(margin: Tensor | float | None, like: tuple[str, Tensor]) -> Tensor | float | None:
    """Check a margin, None, a number or (B,), and return it as a float or a floating-point tensor."""
    if margin is None:
        return None
    return check_of_pairs("margin", margin, like) if isinstance(margin, Tensor) else check_finite("margin", margin)


def weighted_types(
    loss_type: str | Sequence[str] | Mapping[str, float], loss_weights: Sequence[float] | None
) -> Weighted:
    """Return the loss types that a call names, each with its weight."""
    if isinstance(loss_type, str) and loss_weights is None:
        check_choice("loss_type", loss_type, LOSS_TYPES)
        return ((LOSS_TYPES[loss_type], 1.0),)
    if isinstance(loss_type, Mapping):
        if loss_weights is not None:
            raise ValueError(
                "loss_weights must be None where loss_type is a mapping, which holds the weights itself; got "
                f"{describe(loss_weights)} with loss_type={loss_type!r}"
            )
        names, weights, weights_name = tuple(loss_type), tuple(loss_type.values()), "a weight in loss_type"
    else:
        # Not any iterable: the order of a set differs from process to process, and with it which weight is whose.
        names = (loss_type,) if isinstance(loss_type, str) else loss_type
        if not is_sequence(names):
            raise TypeError(
                "loss_type must be a name, a sequence of names, or a mapping of names to weights; got "
                f"{describe(loss_type)}"
            )
        weights, weights_name = (1.0,) * len(names) if loss_weights is None else loss_weights, "loss_weights"
        if not is_sequence(weights):
            raise TypeError(f"loss_weights must be None or a sequence of numbers; got {describe(loss_weights)}")
    if not names:
        raise ValueError(f"loss_type must name at least one type; got {describe(loss_type)}")
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights must hold one weight for each of {len(names)} loss types; got {describe(loss_weights)}"
        )
    for name in names:
        check_choice("loss_type", name, LOSS_TYPES)
    return tuple(
        (LOSS_TYPES[name], check_finite(weights_name, weight)) for name, weight in zip(names, weights, strict=True)
    )


def check_options(
    types: Weighted, *, beta: float, label_smoothing: float, reduction: str, length_normalize: bool,
    margin: Tensor | float | None, weights: Tensor | None, f_divergence: str, f_alpha: float, reference_free: bool,
    delta: float, gamma: float, discopop_tau: float, sft_weight: float, sft_reduction: str,
) -> Numbers:  # fmt: skip
    """Check `dpo_loss`'s options, each by itself and with the loss types, which must have a place for what is given."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    check_choice("sft_reduction", sft_reduction, SFT_REDUCTIONS)
    check_bool("length_normalize", length_normalize)
    check_bool("reference_free", reference_free)
    numbers = Numbers(
        check_positive("beta", beta),
        check_finite("label_smoothing", label_smoothing, least=0.0, most=1.0),
        check_finite("f_alpha", f_alpha),
        check_finite("delta", delta),
        check_finite("gamma", gamma),
        check_positive("discopop_tau", discopop_tau),
        check_finite("sft_weight", sft_weight, least=0.0),
    )
    for kind, _ in types:
        if kind.name == "robust" and label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be below 1/2 for loss_type='robust'; got {label_smoothing!r}")
        if kind.name == "exo_pair" and not 0 < label_smoothing < 1:
            raise ValueError(
                "label_smoothing must be between 0 and 1, both excluded, for loss_type='exo_pair'; got "
                f"{label_smoothing!r}"
            )
        if kind.likelihood and sft_weight:
            raise ValueError(f"loss_type 'sft' has its weight in loss_weights; got sft_weight={sft_weight!r} as well")
    if f_divergence != "alpha" and f_alpha != 0.5:
        raise ValueError(f"f_alpha is the α of f_divergence='alpha'; got f_alpha={f_alpha!r} with {f_divergence!r}")
    for name, value, is_given in (
        ("label_smoothing", label_smoothing, label_smoothing != 0.0),
        ("length_normalize", length_normalize, length_normalize),
        ("margin", margin, margin is not None),
        ("weights", weights, weights is not None),
        ("f_divergence", f_divergence, f_divergence != "reverse_kl"),
        ("delta", delta, delta != 0.0),
        ("gamma", gamma, gamma != 0.5),
        ("discopop_tau", discopop_tau, discopop_tau != 0.05),
    ):
        if is_given and not any(name in kind.takes for kind, _ in types):
            what = "" if isinstance(value, Tensor) else f"={value!r}"
            taking = ", ".join(kind.name for kind in LOSS_TYPES.values() if name in kind.takes)
            names = ", ".join(kind.name for kind, _ in types)
            raise ValueError(f"{name}{what} has no place in loss_type {names}; it has in {taking}")
    return numbers


def _types_and_numbers(
    loss_type: str | Sequence[str] | Mapping[str, float], loss_weights: Sequence[float] | None, **options: Any
) -> tuple[Weighted, Numbers]:
    types = weighted_types(loss_type, loss_weights)
    return types, check_options(types, **options)


_remembered = remembered(_types_and_numbers)


def resolve_types(
    loss_type: str | Sequence[str] | Mapping[str, float], loss_weights: Sequence[float] | None, *,
    margin: Tensor | float | None, weights: Tensor | None, **options: Any,
) -> tuple[Weighted, Numbers]:  # fmt: skip
    """Check `dpo_loss`'s options. Return the loss types, each with its weight, and the options that are numbers."""
    # The cache must not keep tensors alive.
    check = _types_and_numbers if isinstance(margin, Tensor) or weights is not None else _remembered
    return check(loss_type, loss_weights, margin=margin, weights=weights, **options)


def needs_reference(types: Weighted, reference_free: bool) -> bool:
    """Whether any of the types compares with the reference."""
    if not reference_free:
        for kind, _ in types:
            if kind.reference:
                return True
    return False


def needs_lengths(types: Weighted, length_normalize: bool, sft_weight: float) -> tuple[bool, bool]:
    """Whether the chosen completions' lengths enter, and whether the rejected ones' do."""
    divides, likelihood = length_normalize, sft_weight > 0
    for kind, _ in types:
        divides = divides or kind.normalized
        likelihood = likelihood or kind.likelihood
    return divides or likelihood, divides


def check_dpo(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None, *, loss_type: str | Sequence[str] | Mapping[str, float],
    loss_weights: Sequence[float] | None, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None,
    margin: Tensor | float | None, weights: Tensor | None, **options: Any,
) -> tuple[Weighted, Numbers, Tensor | float | None, Tensor | None]:  # fmt: skip
    """Check `dpo_loss`'s arguments. Return the loss types, each with its weight, the numbers, margin and weights."""
    check_vectors(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    like = ("policy_chosen_logps", policy_chosen_logps)
    margin = check_margin(margin, like)
    if weights is not None:
        weights = check_of_pairs("weights", weights, like)
    types, numbers = resolve_types(loss_type, loss_weights, margin=margin, weights=weights, **options)
    if (ref_chosen_logps is None or ref_rejected_logps is None) and needs_reference(types, options["reference_free"]):
        missing = "ref_chosen_logps" if ref_chosen_logps is None else "ref_rejected_logps"
        raise ValueError(f"loss_type={loss_type!r} needs {missing}; pass it, or reference_free=True")
    of_chosen, of_rejected = needs_lengths(types, options["length_normalize"], numbers.sft_weight)
    for name, value, needed in (
        ("chosen_lengths", chosen_lengths, of_chosen), ("rejected_lengths", rejected_lengths, of_rejected),
    ):  # fmt: skip
        if value is not None:
            check_vector(name, value, NUMBERS, "an integer or floating-point tensor (B,)", like)
        elif needed:
            raise ValueError(
                f"{name} is needed by loss_type={loss_type!r} with length_normalize={options['length_normalize']!r} "
                f"and sft_weight={numbers.sft_weight!r}: (B,) numbers of completion tokens; got None"
            )
    return types, numbers, margin, weights


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
    """`fastpref.dpo_loss` in plain PyTorch."""
    types, numbers, margin, weights = check_dpo(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta,
        loss_type=loss_type, loss_weights=loss_weights, label_smoothing=label_smoothing, reduction=reduction,
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, length_normalize=length_normalize,
        margin=margin, weights=weights, f_divergence=f_divergence, f_alpha=f_alpha, reference_free=reference_free,
        delta=delta, gamma=gamma, discopop_tau=discopop_tau, sft_weight=sft_weight, sft_reduction=sft_reduction,
    )  # fmt: skip
    beta, label_smoothing, f_alpha, delta, gamma, discopop_tau, sft_weight = numbers
    if needs_reference(types, reference_free):
        assert ref_chosen_logps is not None
        assert ref_rejected_logps is not None
        w, l, rw, rl = widen(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)  # noqa: E741
    else:
        w, l = widen(policy_chosen_logps, policy_rejected_logps)  # noqa: E741
        rw, rl = torch.zeros_like(w), torch.zeros_like(l)
    n_w, n_l, weights = [
        None if x is None else x.detach().to(w.dtype) for x in (chosen_lengths, rejected_lengths, weights)
    ]
    apart = margin.detach().to(w.dtype) if isinstance(margin, Tensor) else margin
    raw_dw, raw_dl = w - rw, l - rl
    nll = None
    if sft_weight or any(kind.likelihood for kind, _ in types):
        assert n_w is not None
        total = n_w.sum().clamp(min=1) / max(w.numel(), 1)
        nll = -w / (total if sft_reduction == "token" else n_w.clamp(min=1))

    def pairs(normalized: bool) -> Pairs:
        chosen, rejected, ref_chosen, ref_rejected, of_w, of_l = w, l, rw, rl, None, None
        if normalized and n_w is not None and n_l is not None:
            of_w, of_l = n_w.clamp(min=1), n_l.clamp(min=1)
            chosen, rejected, ref_chosen, ref_rejected = w / of_w, l / of_l, rw / of_w, rl / of_l
        dw, dl, h = under_divergence(raw_dw, raw_dl, of_w, of_l, f_divergence, f_alpha)
        return Pairs(
            w=chosen, l=rejected, rw=ref_chosen, rl=ref_rejected, dw=dw, dl=dl, h=h, nll=nll, margin=apart, beta=beta,
            epsilon=label_smoothing, delta=delta, gamma=gamma, tau=discopop_tau,
        )  # fmt: skip

    terms = [] if nll is None or not sft_weight else [sft_weight * nll]
    for kind, weight in types:
        of_kind = kind.losses(pairs(length_normalize or kind.normalized))
        if weights is not None and "weights" in kind.takes:
            of_kind = of_kind * weights
        terms.append(of_kind if weight == 1 else weight * of_kind)
    losses = functools.reduce(torch.add, terms)
    return PreferenceLoss(reduce(losses, reduction), beta * raw_dw.detach(), beta * raw_dl.detach())


def check_kto(
    policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor | float, *, beta: float,
    desirable_weight: float, undesirable_weight: float, reduction: str,
) -> tuple[Tensor | float, float, float, float]:  # fmt: skip
    """Check `kto_loss`'s arguments. Return `kl`, `beta` and the two weights, as floats what is no tensor."""
    check_vectors(policy_logps=policy_logps, ref_logps=ref_logps)
    check_vector("desirable", desirable, (torch.bool,), "a bool tensor (B,)", ("policy_logps", policy_logps))
    if isinstance(kl, Tensor):
        check_tensor("kl", kl, FLOATING, "a number, or a floating-point tensor () or (K,)")
        if kl.dim() > 1:
            raise shape_error("kl", kl, "a number, () or (K,)")
        check_same_device("kl", kl, "policy_logps", policy_logps)
    else:
        kl = check_finite("kl", kl)
    check_choice("reduction", reduction, REDUCTIONS)
    return (
        kl,
        check_positive("beta", beta),
        check_finite("desirable_weight", desirable_weight, least=0.0),
        check_finite("undesirable_weight", undesirable_weight, least=0.0),
    )


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
    """`fastpref.kto_loss` in plain PyTorch."""
    kl, beta, desirable_weight, undesirable_weight = check_kto(
        policy_logps, ref_logps, desirable, kl, beta=beta, desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight, reduction=reduction,
    )  # fmt: skip
    logps, ref = widen(policy_logps, ref_logps)
    ratio = logps - ref
    if isinstance(kl, Tensor):
        z = reduce(kl.detach().to(ratio.dtype), "mean").clamp(min=0)
    else:
        z = max(kl, 0.0)
    above = ratio - z
    losses = torch.sigmoid(-beta * torch.where(desirable, above, -above))
    if desirable_weight != 1 or undesirable_weight != 1:
        losses = torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)
    return KTOResult(reduce(losses, reduction), beta * ratio.detach())


def wpo_weights(logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """WPO's weights of pairs (arXiv 2406.11827): Π exp(mean_t(logp_t − log Σ_j p_j²)) over a pair's two completions.

    How likely the policy is to have written the pair itself, each token's probability against what its own choice
    would have had in expectation. For `dpo_loss`'s `weights`.

    Args:
        logps: (2B, T) token log-probs, [chosen; rejected].
        log_sum_sq_probs: (2B, T), that statistic of `token_logprobs`.
        mask: (2B, T) bool, True where a token counts.

    Returns:
        (B,) weights, detached, float32 (float64 for float64). A completion without a token that counts adds a factor 1.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices differ, or the sequences are not [chosen; rejected].
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
    logps, log_sum_sq_probs = widen(logps.detach(), log_sum_sq_probs.detach())
    aligned = (logps - log_sum_sq_probs).masked_fill(~mask, 0.0)
    chosen, rejected = (aligned.sum(-1) / mask.sum(-1).clamp(min=1)).tensor_split(2)
    return torch.exp(chosen + rejected)


def implicit_reward(logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """The reward a policy implies (arXiv 2305.18290 eq. 5), up to the prompt's constant β log Z: β(logp − ref).

    Args:
        logps: log π(y|x), any shape, any floating dtype.
        ref_logps: log π_ref(y|x), of the same shape.
        beta: β > 0.

    Returns:
        Rewards of logps' shape, float32 (float64 for float64), differentiable in both.

    Raises:
        TypeError: a tensor is not floating point.
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
    beta = check_positive("beta", beta)
    logps, ref_logps = widen(logps, ref_logps)
    return beta * (logps - ref_logps)

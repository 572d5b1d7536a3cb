"""The options of the DPO family: one bundle as a call gives them, and one as checked, with what they imply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._core.checks import (
    FLOATING,
    REDUCTIONS,
    are_like_vectors,
    check_bool,
    check_choice,
    check_finite,
    check_positive,
    check_same_device,
    check_tensor,
    check_vector,
    describe,
    is_sequence,
    remembered,
    shape_error,
)
from fastpref._core.loss_checks import NUMBERS, check_vectors
from fastpref._core.options import replaced
from fastpref.reference.losses.loss_types import F_DIVERGENCES, LOSS_TYPES, LossType

SFT_REDUCTIONS = ("token", "sequence")
Weighted = tuple[tuple[LossType, float], ...]
"""Loss types, each with its weight."""
PairLogps = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""policy_chosen, policy_rejected, ref_chosen and ref_rejected log-probs, (B,) each."""


class PreferenceOptions(NamedTuple):
    """The options of `dpo_loss`, as a call gives them. The (B,) tensors come last."""

    beta: float = 0.1
    loss_type: str | Sequence[str] | Mapping[str, float] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    reduction: str = "mean"
    length_normalize: bool = False
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    reference_free: bool = False
    delta: float = 0.0
    gamma: float = 0.5
    discopop_tau: float = 0.05
    sft_weight: float = 0.0
    sft_reduction: str = "token"
    margin: Tensor | float | None = None
    weights: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the given options that must be (B,) tensors, by name."""
        given = zip(_TENSORS, tuple(self)[_MARGIN + 1 :], strict=True)
        found = {name: value for name, value in given if value is not None}
        return {**found, "margin": self.margin} if isinstance(self.margin, Tensor) else found  # type: ignore[return-value]


_MARGIN = PreferenceOptions._fields.index("margin")
_TENSORS = PreferenceOptions._fields[_MARGIN + 1 :]


class Term(NamedTuple):
    """One of the losses that a call adds up, with the options that its type takes; its other options are neutral.

    Attributes:
        kind: the loss type.
        weight: the factor of the loss.
        label_smoothing: ε.
        margin: a margin that all pairs share.
        length_normalize: whether log-probs are divided by lengths.
        f_divergence: the divergence.
        uses_reference: whether the reference's log-probs enter.
        sft_weight: the factor of the likelihood of the chosen completions. The first term carries it for all terms.
    """

    kind: LossType
    weight: float
    label_smoothing: float
    margin: float
    length_normalize: bool
    f_divergence: str
    uses_reference: bool
    sft_weight: float


class Preference(NamedTuple):
    """The checked options of `dpo_loss`, and what they imply.

    Attributes:
        options: the options, with numbers as floats.
        types: the loss types, each with its weight.
        needs_reference: whether a type compares with the reference.
        needs_chosen_lengths: whether the chosen completions' lengths enter.
        needs_rejected_lengths: whether the rejected completions' lengths enter.
        mixes_pairs: whether the loss of a pair depends on other pairs.
        terms: the losses to be added, in an order in which the first one gives the rewards.
    """

    options: PreferenceOptions
    types: Weighted
    needs_reference: bool
    needs_chosen_lengths: bool
    needs_rejected_lengths: bool
    mixes_pairs: bool
    terms: tuple[Term, ...]

    def replace(self, **options: Any) -> Preference:
        """Return the bundle with other tensors or another reduction, which are not checked."""
        return replaced(self, options=replaced(self.options, **options))


def resolve_preference(options: PreferenceOptions, like: tuple[str, Tensor] | None = None) -> Preference:
    """Check each option of `dpo_loss`, and that the loss types take every option that is given.

    The caller checks that the reference's log-probs and the lengths are given, if they are needed.

    Args:
        options: the options.
        like: the name of a tensor, and a tensor whose first dimension is B and whose device is that of the pairs.
            None where the options hold no tensors.

    Raises:
        TypeError: an option of a wrong type, or a tensor of a wrong dtype.
        ValueError: shapes or devices differ, or an option is out of range or taken by none of the loss types.
    """
    return _with_tensors(options, options.tensors(), like)


def resolve_pairs(logps: PairLogps, options: PreferenceOptions) -> Preference:
    """Check the log-probs and the options of `dpo_loss`, and that the reference and the lengths are given.

    Raises:
        TypeError: an option of a wrong type, or a tensor of a wrong dtype.
        ValueError: shapes or devices differ, an option is out of range or taken by none of the loss types, or the
            reference's log-probs or the lengths are missing.
    """
    tensors, like = options.tensors(), None
    if not are_like_vectors(*logps, *tensors.values()):
        check_vectors(
            policy_chosen_logps=logps[0],
            policy_rejected_logps=logps[1],
            ref_chosen_logps=logps[2],
            ref_rejected_logps=logps[3],
        )
        like = ("policy_chosen_logps", logps[0])
    preference = _with_tensors(options, tensors, like)
    if preference.needs_reference and (logps[2] is None or logps[3] is None):
        missing = "ref_chosen_logps" if logps[2] is None else "ref_rejected_logps"
        raise ValueError(f"loss_type={options.loss_type!r} needs {missing}; pass it, or reference_free=True")
    if preference.needs_chosen_lengths and options.chosen_lengths is None:
        raise _missing("chosen_lengths", options)
    if preference.needs_rejected_lengths and options.rejected_lengths is None:
        raise _missing("rejected_lengths", options)
    return preference


def _missing(name: str, options: PreferenceOptions) -> ValueError:
    return ValueError(
        f"{name} is needed by loss_type={options.loss_type!r} with length_normalize={options.length_normalize!r} and "
        f"sft_weight={options.sft_weight!r}: (B,) numbers of completion tokens; got None"
    )


def _with_tensors(
    options: PreferenceOptions, tensors: dict[str, Tensor], like: tuple[str, Tensor] | None
) -> Preference:
    """Resolve the options, and check their tensors against `like`, which is None if they have been checked."""
    if like is not None:
        for name, value in tensors.items():
            check_vector(name, value, NUMBERS, "a floating-point or integer tensor (B,)", like)
    margin = None if "margin" in tensors else options.margin
    preference = _resolve(*tuple(options)[:_MARGIN], margin, "margin" in tensors, "weights" in tensors)
    if not tensors:
        return preference
    # The cache holds no tensors, because it would keep them alive.
    return replaced(preference, options=replaced(preference.options, **tensors))


@remembered
def _resolve(*arguments: object) -> Preference:
    """Resolve the options without the tensors.

    The arguments are the options up to the margin, whether there are margins (B,), and whether there are weights.
    """
    *scalars, has_margins, has_weights = arguments
    options = PreferenceOptions(*scalars)  # type: ignore[arg-type]
    types = weighted_types(options.loss_type, options.loss_weights)
    given, options = options, _checked(options)
    _check_places(given, types, bool(has_margins), bool(has_weights))
    if not isinstance(options.loss_type, str) or options.loss_weights is not None:
        names, weights = zip(*((kind.name, weight) for kind, weight in types), strict=True)
        options = replaced(options, loss_type=names, loss_weights=weights)
    divides = options.length_normalize or any(kind.normalized for kind, _ in types)
    likelihood = options.sft_weight > 0 or any(kind.likelihood for kind, _ in types)
    return Preference(
        options,
        types,
        needs_reference=not options.reference_free and any(kind.reference for kind, _ in types),
        needs_chosen_lengths=divides or likelihood,
        needs_rejected_lengths=divides,
        mixes_pairs=any(kind.mixes_pairs for kind, _ in types),
        terms=_terms(options, types),
    )


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
        # Not every iterable is accepted: the order of a set differs between processes, and so would the pairing with
        # weights.
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


def _checked(options: PreferenceOptions) -> PreferenceOptions:
    """Check every option by itself, and return the options with numbers as floats."""
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_choice("f_divergence", options.f_divergence, F_DIVERGENCES)
    check_choice("sft_reduction", options.sft_reduction, SFT_REDUCTIONS)
    check_bool("length_normalize", options.length_normalize)
    check_bool("reference_free", options.reference_free)
    return replaced(
        options,
        beta=check_positive("beta", options.beta),
        label_smoothing=check_finite("label_smoothing", options.label_smoothing, least=0.0, most=1.0),
        f_alpha=check_finite("f_alpha", options.f_alpha),
        delta=check_finite("delta", options.delta),
        gamma=check_finite("gamma", options.gamma),
        discopop_tau=check_positive("discopop_tau", options.discopop_tau),
        sft_weight=check_finite("sft_weight", options.sft_weight, least=0.0),
        margin=None if options.margin is None else check_finite("margin", options.margin),
    )


def _check_places(options: PreferenceOptions, types: Weighted, has_margins: bool, has_weights: bool) -> None:
    """Raise `ValueError` unless the loss types take every option that is given."""
    smoothing, sft_weight = options.label_smoothing, options.sft_weight
    for kind, _ in types:
        if kind.name == "robust" and smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be below 1/2 for loss_type='robust'; got {smoothing!r}")
        if kind.name == "exo_pair" and not 0 < smoothing < 1:
            raise ValueError(
                f"label_smoothing must be between 0 and 1, both excluded, for loss_type='exo_pair'; got {smoothing!r}"
            )
        if kind.likelihood and sft_weight:
            raise ValueError(f"loss_type 'sft' has its weight in loss_weights; got sft_weight={sft_weight!r} as well")
    if options.f_divergence != "alpha" and options.f_alpha != 0.5:
        raise ValueError(
            f"f_alpha is the α of f_divergence='alpha'; got f_alpha={options.f_alpha!r} with {options.f_divergence!r}"
        )
    defaults = PreferenceOptions()
    for name in ("label_smoothing", "length_normalize", "margin", "f_divergence", "delta", "gamma", "discopop_tau"):
        value = getattr(options, name)
        if value != getattr(defaults, name):
            _check_place(name, f"={value!r}", types)
    if has_margins:
        _check_place("margin", "", types)
    if has_weights:
        _check_place("weights", "", types)


def _check_place(name: str, value: str, types: Weighted) -> None:
    if not any(name in kind.takes for kind, _ in types):
        taking = ", ".join(kind.name for kind in LOSS_TYPES.values() if name in kind.takes)
        names = ", ".join(kind.name for kind, _ in types)
        raise ValueError(f"{name}{value} is not an option of loss_type {names}; it is one of {taking}")


def _terms(options: PreferenceOptions, types: Weighted) -> tuple[Term, ...]:
    # The likelihood is part of the first term; alone it is a term of its own.
    likelihood = options.sft_weight + sum(weight for kind, weight in types if kind.likelihood)
    terms: list[Term] = []
    for kind, weight in [pair for pair in types if not pair[0].likelihood] or [(LOSS_TYPES["sft"], 0.0)]:
        takes = kind.takes
        term = Term(
            kind=kind,
            weight=weight,
            label_smoothing=options.label_smoothing if "label_smoothing" in takes else 0.0,
            margin=options.margin if isinstance(options.margin, float) and "margin" in takes else 0.0,
            length_normalize=kind.normalized or (options.length_normalize and "length_normalize" in takes),
            f_divergence=options.f_divergence if "f_divergence" in takes else "reverse_kl",
            uses_reference=kind.reference and not options.reference_free,
            sft_weight=likelihood,
        )
        likelihood = 0.0
        # The rewards compare with the reference if any type does.
        terms.insert(0 if kind.reference else len(terms), term)
    return tuple(terms)


def check_kto(
    logps: tuple[Tensor, Tensor, Tensor],
    kl: Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    reduction: str,
) -> tuple[Tensor | float, float, float, float]:
    """Check `kto_loss`'s arguments. Return `kl`, `beta` and the two weights, with numbers as floats.

    `logps` are policy_logps, ref_logps and desirable.
    """
    policy_logps, ref_logps, desirable = logps
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

"""Preference losses on sequence log-probs, for training loops.

A (B,) tensor is too small to win anything on a CPU: there the reference formula runs. A GPU computes the loss, the
rewards and the partial derivatives of a type in one launch (`aot` sorts in another), and its backward is one
multiplication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref._checks import are_like_vectors, remembered
from fastpref._results import KTOResult, PreferenceLoss
from fastpref.losses._launch import fused, launch
from fastpref.reference.losses import preference as reference
from fastpref.reference.losses.loss_types import LOSS_TYPES
from fastpref.reference.losses.preference import implicit_reward, wpo_weights

__all__ = ["dpo_loss", "implicit_reward", "kto_loss", "wpo_weights"]

# `dpo_loss`'s tensors beside log-probs. The margins are only among them where they are not one number.
_OF_PAIRS = ("chosen_lengths", "rejected_lengths", "weights", "margin")
_STAND_IN = torch.empty(0)


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
    """The DPO family: loss and implicit rewards of B pairs from their summed log-probs.

    With w, l the log-probs of the chosen and the rejected completion and rw, rl those under the reference, Δw = w − rw,
    Δl = l − rl, h = Δw − Δl, u = βh − margin and ε = `label_smoothing`, `sigmoid` is −(1−ε) log σ(u) − ε log σ(−u): DPO
    (arXiv 2305.18290, eq. 7), and with ε > 0 conservative DPO. `fastpref.losses.LOSS_TYPES` has every type's formula,
    derivative, paper and options.

    An option is computed or refused: one that no given type has a place for is an error. Of several types, those take
    an option that have a place for it.

    Args:
        policy_chosen_logps: (B,) log π(chosen|x), nats, any floating dtype; computed in float32 (float64 for float64).
        policy_rejected_logps: (B,) log π(rejected|x).
        ref_chosen_logps: (B,) log π_ref(chosen|x); may be left out with `reference_free`, and by types that have no
            reference (`simpo`, `cpo`, `orpo`, `sft`), which ignore it.
        ref_rejected_logps: (B,) log π_ref(rejected|x); likewise.
        beta: β > 0, the strength of the KL constraint.
        loss_type: one of `fastpref.losses.LOSS_TYPES`; or a sequence of them, whose losses are added; or a mapping of
            them to their weights, whose weighted losses are added.
        loss_weights: one weight for each of a sequence of loss types; None: 1 each, or those of the mapping.
        label_smoothing: ε in [0, 1], the probability that a pair's label is flipped; below ½ for `robust`, between 0
            and 1 for `exo_pair`.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no pairs is 0. Of the `aot` types, which sort,
            "none" gives the k-th smallest's losses.
        chosen_lengths: (B,) numbers of the chosen completions' tokens, for types and options that divide by them; a
            length of 0 divides by 1.
        rejected_lengths: (B,) numbers of the rejected completions' tokens.
        length_normalize: divide what is compared by the lengths: w, rw and Δw by n_w; l, rl and Δl by n_l. `simpo`,
            `orpo` and `sigmoid_norm` do so anyway.
        margin: None, a number, or (B,), integers too: how far apart u should at least be (ODPO, arXiv 2402.10571).
            Carries no gradient.
        weights: None, or (B,), integers too: multiplies the pairs' losses, `sft` excepted; the mean still divides by B.
            Carries no gradient. `wpo_weights` makes WPO's (arXiv 2406.11827).
        f_divergence: "reverse_kl" (DPO), "forward_kl" (1 − e^{−Δ}), "js" (log 2 + log σ(Δ)) or "alpha"
            ((e^{(α−1)Δ} − 1)/(α−1)), in place of Δw and Δl, before their division by lengths (arXiv 2309.16240).
        f_alpha: α of `f_divergence="alpha"`; at 1 it is "reverse_kl".
        reference_free: take the reference's log-probs as 0, whether or not they are given, in the rewards too.
        delta: δ of `bco_pair`, the reward that tells chosen from rejected.
        gamma: γ of `simpo`, its target margin.
        discopop_tau: τ > 0 of `discopop`.
        sft_weight: adds this much of the chosen completions' negative log-likelihood.
        sft_reduction: of that term, and of the type `sft`: "token", −Σ w / Σ n_w over the batch, or "sequence",
            −mean(w / n_w).

    Returns:
        PreferenceLoss(loss, chosen_rewards, rejected_rewards). The rewards are β(w − rw) and β(l − rl), detached and
        (B,) whatever the reduction, the divergence and the lengths.

    Raises:
        TypeError: a tensor of a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ, an option is out of range or has no place in any of the loss types, or the
            reference's log-probs or the lengths are missing.
    """
    options: dict[str, Any] = {
        "beta": beta,
        "loss_type": loss_type,
        "loss_weights": loss_weights,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "length_normalize": length_normalize,
        "f_divergence": f_divergence,
        "f_alpha": f_alpha,
        "reference_free": reference_free,
        "delta": delta,
        "gamma": gamma,
        "discopop_tau": discopop_tau,
        "sft_weight": sft_weight,
        "sft_reduction": sft_reduction,
    }
    of_pairs: dict[str, Any] = {
        "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, "weights": weights,
    }  # fmt: skip
    (of_pairs if isinstance(margin, Tensor) else options)["margin"] = margin
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if not fused(policy_chosen_logps):
        return reference.dpo_loss(*logps, **of_pairs, **options)
    given = (*logps, *of_pairs.values())
    if not torch.compiler.is_compiling() and are_like_vectors(*given):
        launches = _resolve_alike(*[value is not None for value in given], **options)
    else:
        launches, of_pairs = _resolve(logps, of_pairs, options)
    if not launches:
        return reference.dpo_loss(*logps, **of_pairs, **options)
    results = [
        launch(
            "dpo_loss", reduction,
            (
                policy_chosen_logps, policy_rejected_logps, ref_chosen_logps if of_type.reference else None,
                ref_rejected_logps if of_type.reference else None, chosen_lengths, rejected_lengths,
                of_pairs.get("margin") if of_type.margin else None, of_pairs["weights"] if of_type.weights else None,
            ),
            of_type.options,
        )
        for of_type in launches
    ]  # fmt: skip
    loss = results[0][0]
    for made in results[1:]:
        loss = loss + made[0]
    return PreferenceLoss(loss, *results[0][1:])


class _Launch(NamedTuple):
    """One launch of `fastpref::dpo_loss`.

    Attributes:
        reference: whether it is given the reference's log-probs.
        margin: whether it is given the pairs' margins.
        weights: whether it is given the pairs' weights.
        options: its other arguments, but for the reduction.
    """

    reference: bool
    margin: bool
    weights: bool
    options: tuple[Any, ...]


def _resolve(
    logps: Sequence[Tensor | None], of_pairs: dict[str, Any], options: Mapping[str, Any]
) -> tuple[tuple[_Launch, ...], dict[str, Any]]:
    """Check `dpo_loss`'s arguments. Return its launches, none where they cannot do it, and `of_pairs` as they take it.

    The losses of the launches are added, and the first gives the rewards.
    """
    types, numbers, margin, weights = reference.check_dpo(*logps, **of_pairs, **options)  # type: ignore[arg-type]
    of_pairs = of_pairs | {"weights": weights}
    constant = 0.0
    if isinstance(margin, Tensor):
        of_pairs["margin"] = margin
    else:
        constant = margin or 0.0
    if options["reduction"] == "none" and any(kind.mixes_pairs for kind, _ in types):
        # One launch gives each pair the gradient of one loss: here those of two losses meet in it.
        return (), of_pairs
    # The likelihood is part of another type's launch; alone it is its own.
    likelihood = numbers.sft_weight + sum(weight for kind, weight in types if kind.likelihood)
    found: list[_Launch] = []
    for kind, weight in [pair for pair in types if not pair[0].likelihood] or [(LOSS_TYPES["sft"], 0.0)]:
        takes = kind.takes
        of_type = (
            kind.name, weight, numbers.beta, numbers.label_smoothing if "label_smoothing" in takes else 0.0,
            constant if "margin" in takes else 0.0,
            kind.normalized or (options["length_normalize"] and "length_normalize" in takes),
            options["f_divergence"] if "f_divergence" in takes else "reverse_kl", numbers.f_alpha, numbers.delta,
            numbers.gamma, numbers.discopop_tau, likelihood, options["sft_reduction"],
        )  # fmt: skip
        likelihood = 0.0
        uses_reference = kind.reference and not options["reference_free"]
        made = _Launch(uses_reference, "margin" in takes, "weights" in takes, of_type)
        # Rewards are relative to the reference if any type is.
        found.insert(0 if kind.reference else len(found), made)
    return tuple(found), of_pairs


@remembered
def _resolve_alike(*given: bool, **options: Any) -> tuple[_Launch, ...]:
    """Return the launches of `_resolve` for tensors that are alike, of which it is only told which are given."""
    tensors = [_STAND_IN if is_given else None for is_given in given]
    return _resolve(tensors[:4], dict(zip(_OF_PAIRS, tensors[4:], strict=False)), options)[0]


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
    """KTO: loss and implicit rewards of B unpaired answers, each known to be desirable or not (arXiv 2402.01306).

    With Δ = log π − log π_ref and z = max(0, mean of `kl`): λ_d[1 − σ(β(Δ − z))] for a desirable answer, and
    λ_u[1 − σ(β(z − Δ))] for another.

    Args:
        policy_logps: (B,) log π(y|x), nats, any floating dtype; computed in float32 (float64 for float64).
        ref_logps: (B,) log π_ref(y|x).
        desirable: (B,) bool.
        kl: estimates of KL(π‖π_ref), a number, () or (K,) of any K, such as Δ of prompts with others' answers. Carries
            no gradient.
        beta: β > 0.
        desirable_weight: λ_d ≥ 0.
        undesirable_weight: λ_u ≥ 0.
        reduction: "mean" over B, "sum", or "none" for (B,). The mean of no answers is 0.

    Returns:
        KTOResult(loss, rewards), the rewards βΔ detached and (B,).

    Raises:
        TypeError: a tensor of a wrong dtype, or an option of a wrong type.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    scalars: dict[str, Any] = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    if not fused(policy_logps):
        return reference.kto_loss(policy_logps, ref_logps, desirable, kl=kl, reduction=reduction, **scalars)
    kl, *numbers = reference.check_kto(policy_logps, ref_logps, desirable, kl, reduction=reduction, **scalars)
    estimates, constant = (kl, 0.0) if isinstance(kl, Tensor) else (None, kl)
    tensors = (policy_logps, ref_logps, desirable, estimates)
    return KTOResult(*launch("kto_loss", reduction, tensors, (constant, *numbers)))

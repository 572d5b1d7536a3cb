"""Preference losses on sequence log-probs: the definitions, which are also the code that runs on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastpref.reference.losses.loss_types import LOSS_TYPES, LossType, Pairs, under_divergence
from fastpref.reference.losses.reduction import reduce, widen
from fastpref.reference.results import KTOResult, PreferenceLoss


def weighted_types(
    loss_type: str | Sequence[str] | Mapping[str, float], loss_weights: Sequence[float] | None
) -> tuple[tuple[LossType, float], ...]:
    """Return the loss types that a call names, each with its weight. An unknown name is a `ValueError`."""
    if isinstance(loss_type, str):
        loss_type = (loss_type,)
    elif isinstance(loss_type, Mapping):
        loss_weights = tuple(loss_type.values())
    names = tuple(loss_type)
    weights = (1.0,) * len(names) if loss_weights is None else loss_weights
    for name in names:
        if name not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(map(repr, LOSS_TYPES))}; got {name!r}")
    return tuple([(LOSS_TYPES[name], weight) for name, weight in zip(names, weights, strict=True)])


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
    """Compute `fastpref.dpo_loss` in plain PyTorch. `LOSS_TYPES` has the formulas.

    Raises:
        ValueError: an unknown loss type, divergence or reduction; the reference's log-probs or the lengths are missing.
    """
    types = weighted_types(loss_type, loss_weights)
    if not reference_free and any(kind.reference for kind, _ in types):
        if ref_chosen_logps is None or ref_rejected_logps is None:
            raise ValueError(f"loss_type={loss_type!r} needs ref_chosen_logps and ref_rejected_logps")
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
        nll = _likelihood(w, n_w, sft_reduction)

    def pairs(normalized: bool) -> Pairs:
        chosen, rejected, ref_chosen, ref_rejected, of_w, of_l = w, l, rw, rl, None, None
        if normalized:
            if n_w is None or n_l is None:
                raise ValueError(f"loss_type={loss_type!r} with {length_normalize=} needs chosen_ and rejected_lengths")
            of_w, of_l = n_w.clamp(min=1), n_l.clamp(min=1)
            chosen, rejected, ref_chosen, ref_rejected = w / of_w, l / of_l, rw / of_w, rl / of_l
        dw, dl, h = under_divergence(raw_dw, raw_dl, of_w, of_l, f_divergence, f_alpha)
        return Pairs(
            w=chosen,
            l=rejected,
            rw=ref_chosen,
            rl=ref_rejected,
            dw=dw,
            dl=dl,
            h=h,
            nll=nll,
            margin=apart,
            beta=beta,
            epsilon=label_smoothing,
            delta=delta,
            gamma=gamma,
            tau=discopop_tau,
        )

    terms = [] if nll is None or not sft_weight else [sft_weight * nll]
    for kind, weight in types:
        of_kind = kind.losses(pairs(kind.normalized or length_normalize))
        if weights is not None and "weights" in kind.takes:
            of_kind = of_kind * weights
        terms.append(of_kind if weight == 1 else weight * of_kind)
    losses = functools.reduce(torch.add, terms)
    return PreferenceLoss(reduce(losses, reduction), beta * raw_dw.detach(), beta * raw_dl.detach())


def _likelihood(w: Tensor, n_w: Tensor | None, sft_reduction: str) -> Tensor:
    """Return −log π(chosen|x) of each pair, scaled so that its mean is −Σ w/Σ n_w, or −mean(w/n_w)."""
    if n_w is None:
        raise ValueError("the likelihood of the chosen completions needs chosen_lengths")
    if sft_reduction == "token":
        return -w / (n_w.sum().clamp(min=1) / max(w.numel(), 1))
    if sft_reduction == "sequence":
        return -w / n_w.clamp(min=1)
    raise ValueError(f"sft_reduction must be one of 'token', 'sequence'; got {sft_reduction!r}")


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
    """Compute `fastpref.kto_loss` in plain PyTorch. An unknown reduction is a `ValueError`."""
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
    """Compute `fastpref.losses.wpo_weights` in plain PyTorch."""
    logps, log_sum_sq_probs = widen(logps.detach(), log_sum_sq_probs.detach())
    aligned = (logps - log_sum_sq_probs).masked_fill(~mask, 0.0)
    chosen, rejected = (aligned.sum(-1) / mask.sum(-1).clamp(min=1)).tensor_split(2)
    return torch.exp(chosen + rejected)


def implicit_reward(logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """Compute `fastpref.implicit_reward` in plain PyTorch."""
    logps, ref_logps = widen(logps, ref_logps)
    return beta * (logps - ref_logps)

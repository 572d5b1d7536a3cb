"""Preference losses from hidden states: the log-probs of `linear_logprobs`, then the loss of those."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref._checks import (
    FLOATING,
    REDUCTIONS,
    check_bool,
    check_choice,
    check_int,
    check_linear,
    check_scoring,
    check_vector,
    describe,
)
from fastpref._results import linear_group_type, linear_loss_type
from fastpref.reference.distributed import whole_head
from fastpref.reference.linear_logprobs import linear_sequence_logprobs
from fastpref.reference.logprobs import count_sequences, scored_targets, sequence_lengths
from fastpref.reference.losses.preference import (
    NUMBERS,
    Weighted,
    check_margin,
    dpo_loss,
    needs_lengths,
    needs_reference,
    reduce,
    resolve_types,
)

LossFunction = Callable[[Tensor], Tensor]
"""Log-probs (G, K) -> losses (G,), each group on its own."""


def _pairs(labels: Tensor, cu_seqlens: Tensor | None) -> tuple[str, Tensor]:
    """Return a name and a tensor (B,) that say, for `check_vector`, how many pairs labels [chosen; rejected] hold."""
    return "labels", labels.new_empty(count_sequences(labels, cu_seqlens) // 2)


def check_halves(labels: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise `ValueError` unless the sequences can be [chosen; rejected]."""
    sequences = count_sequences(labels, cu_seqlens)
    if sequences % 2:
        raise ValueError(
            f"hidden and labels must hold [chosen; rejected], an even number of sequences; got {sequences}"
        )


def check_references(
    labels: Tensor, cu_seqlens: Tensor | None, ref_chosen_logps: Tensor | None, ref_rejected_logps: Tensor | None,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, reference_free: bool,
    sharded: bool = False,
) -> None:  # fmt: skip
    """Raise unless the reference comes from log-probs, from hidden states, or with `reference_free` from neither."""
    logps = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    states = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    for name, value in logps.items():
        if value is not None:
            check_vector(name, value, FLOATING, "a floating-point tensor (B,)", _pairs(labels, cu_seqlens))
    given = [name for name, value in logps.items() if value is not None]
    made = [name for name, value in states.items() if value is not None]
    if given and made:
        raise ValueError(
            f"the reference's log-probs are given or made from its hidden states, not both; "
            f"got {', '.join(given)} and {', '.join(made)}"
        )
    if made:
        if ref_hidden is None or ref_weight is None:
            missing = "ref_hidden" if ref_hidden is None else "ref_weight"
            raise ValueError(f"a reference made from hidden states needs {missing}; got only {', '.join(made)}")
        check_linear(ref_hidden, ref_weight, labels, ref_bias, cu_seqlens, prefix="ref_", sharded=sharded)
    elif len(given) < 2 and not reference_free:
        missing = ", ".join(name for name in logps if name not in given)
        raise ValueError(f"the loss needs {missing}, or ref_hidden and ref_weight, or reference_free=True")


def check_group(
    labels: Tensor, cu_seqlens: Tensor | None, group_size: int, ld_alpha: float | None, shared_lengths: Tensor | None
) -> int:
    """Raise unless the sequences divide into groups of `group_size`, and LD-DPO's lengths are known. Return that."""
    group_size = check_int("group_size", group_size, least=1)
    sequences = count_sequences(labels, cu_seqlens)
    if sequences % group_size:
        raise ValueError(f"group_size must divide the number of sequences, {sequences}; got {group_size}")
    if ld_alpha is not None and shared_lengths is None and group_size != 2:
        raise ValueError(f"ld_alpha without shared_lengths takes pairs, group_size=2; got group_size={group_size}")
    return group_size


def resolve_options(
    labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool, average_logps: bool, reduction: str,
    options: dict[str, Any],
) -> tuple[Weighted, dict[str, Any]]:  # fmt: skip
    """Check `dpo_loss`'s options before anything is multiplied, and count the lengths that they need and lack.

    `reference_free` becomes whether no type compares with the reference.
    """
    ignore_index = check_scoring(ignore_index, shift)
    check_bool("average_logps", average_logps)
    like = _pairs(labels, cu_seqlens)
    for name in ("chosen_lengths", "rejected_lengths", "weights"):
        if options[name] is not None:
            check_vector(name, options[name], NUMBERS, "a floating-point or integer tensor (B,)", like)
    check_margin(options["margin"], like)
    types, numbers = resolve_types(
        reduction=reduction,
        **{name: value for name, value in options.items() if name not in ("chosen_lengths", "rejected_lengths")},
    )
    needed = needs_lengths(types, options["length_normalize"], numbers.sft_weight)
    if average_logps and any(needed):
        names = ", ".join(kind.name for kind, _ in types)
        raise ValueError(
            f"average_logps=True makes means, and loss_type {names} with length_normalize="
            f"{options['length_normalize']!r} and sft_weight={options['sft_weight']!r} divides by lengths itself"
        )
    lengths = options["chosen_lengths"], options["rejected_lengths"]
    if any(wanted and given is None for wanted, given in zip(needed, lengths, strict=True)):
        rows = labels[None] if labels.dim() == 1 else labels
        _, scored = scored_targets(rows, cu_seqlens, ignore_index=ignore_index, shift=shift)
        counts = sequence_lengths(scored, cu_seqlens, count_sequences(labels, cu_seqlens))
        lengths = tuple(
            counted if given is None else given for given, counted in zip(lengths, counts.tensor_split(2), strict=True)
        )
    return types, {
        **options, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1],
        "reference_free": not needs_reference(types, options["reference_free"]),
    }  # fmt: skip


def check_losses(losses: object, groups: int) -> None:
    """Raise unless `loss_fn` returned floating-point losses (G,)."""
    if not isinstance(losses, Tensor) or losses.dtype not in FLOATING:
        raise TypeError(f"loss_fn must return a floating-point tensor ({groups},); got {describe(losses)}")
    if losses.shape != (groups,):
        raise ValueError(f"loss_fn must return one loss a group, ({groups},); got {describe(losses)}")


def check_constant(losses: Tensor, members: Tensor) -> None:
    """Raise `ValueError` where losses of `members` depend on anything else that requires a gradient.

    With the gradients made in the forward such a tensor would get none, and with the log-probs made first it would: one
    batch trains it and a longer one does not.
    """
    nodes, seen = [losses.grad_fn], {members.grad_fn}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not members:
            raise ValueError(
                f"loss_fn must be a function of its log-probs alone; it depends on {describe(leaf)} that requires a "
                "gradient, which it would not always get: detach it"
            )
        nodes += [parent for parent, _ in node.next_functions]


def _sequences(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, average_logps: bool, stats: tuple[str, ...],
    linear: dict[str, Any],
) -> tuple[Tensor, tuple[Tensor, ...], tuple[str, ...]]:  # fmt: skip
    """The sequences' log-probs, the statistics, detached, and their names."""
    reduction = "mean" if average_logps else "sum"
    result = linear_sequence_logprobs(hidden, weight, labels, bias, reduction=reduction, stats=stats, **linear)
    if isinstance(result, Tensor):
        return result, (), ()
    return result[0], tuple(value.detach() for value in result[1:]), result._fields[1:]


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
) -> Any:
    """`fastpref.linear_dpo_loss` in plain PyTorch."""
    hidden, weight, bias, labels = whole_head(hidden, weight, bias, labels, process_group)
    if ref_weight is not None:
        ref_hidden, ref_weight, ref_bias, _ = whole_head(ref_hidden, ref_weight, ref_bias, labels, process_group)
    check_linear(hidden, weight, labels, bias, cu_seqlens)
    check_halves(labels, cu_seqlens)
    options = {
        "beta": beta, "loss_type": loss_type, "loss_weights": loss_weights, "label_smoothing": label_smoothing,
        "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, "length_normalize": length_normalize,
        "margin": margin, "weights": weights, "f_divergence": f_divergence, "f_alpha": f_alpha,
        "reference_free": reference_free, "delta": delta, "gamma": gamma, "discopop_tau": discopop_tau,
        "sft_weight": sft_weight, "sft_reduction": sft_reduction,
    }  # fmt: skip
    _, options = resolve_options(labels, cu_seqlens, ignore_index, shift, average_logps, reduction, options)
    check_references(
        labels, cu_seqlens, ref_chosen_logps, ref_rejected_logps, ref_hidden, ref_weight, ref_bias,
        options["reference_free"],
    )  # fmt: skip
    linear = {
        "cu_seqlens": cu_seqlens, "ld_alpha": ld_alpha, "shared_lengths": shared_lengths, "mode": mode,
        "chunk_rows": chunk_rows, "filter_eps": filter_eps, "scored_rows": scored_rows, "ignore_index": ignore_index,
        "shift": shift, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
    }  # fmt: skip
    if ref_hidden is not None and not options["reference_free"]:
        assert ref_weight is not None
        with torch.no_grad():
            made, _, _ = _sequences(ref_hidden, ref_weight, labels, ref_bias, average_logps, (), linear)
        ref_chosen_logps, ref_rejected_logps = made.tensor_split(2)
    logps, statistics, names = _sequences(hidden, weight, labels, bias, average_logps, stats, linear)
    chosen, rejected = logps.tensor_split(2)
    loss = dpo_loss(
        chosen, rejected,
        None if ref_chosen_logps is None else ref_chosen_logps.detach().to(chosen.dtype),
        None if ref_rejected_logps is None else ref_rejected_logps.detach().to(chosen.dtype),
        reduction=reduction, **options,
    )  # fmt: skip
    return linear_loss_type(names)(*loss, chosen.detach(), rejected.detach(), *statistics)


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
) -> Any:
    """`fastpref.linear_preference_loss` in plain PyTorch."""
    hidden, weight, bias, labels = whole_head(hidden, weight, bias, labels, process_group)
    check_linear(hidden, weight, labels, bias, cu_seqlens)
    check_choice("reduction", reduction, REDUCTIONS)
    check_bool("average_logps", average_logps)
    group_size = check_group(labels, cu_seqlens, group_size, ld_alpha, shared_lengths)
    linear = {
        "cu_seqlens": cu_seqlens, "ld_alpha": ld_alpha, "shared_lengths": shared_lengths, "mode": mode,
        "chunk_rows": chunk_rows, "filter_eps": filter_eps, "scored_rows": scored_rows, "ignore_index": ignore_index,
        "shift": shift, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
    }  # fmt: skip
    logps, statistics, names = _sequences(hidden, weight, labels, bias, average_logps, stats, linear)
    # Sequence k·G + i is member k of group i.
    members = logps.view(group_size, logps.shape[0] // group_size).T
    losses = loss_fn(members)
    check_losses(losses, members.shape[0])
    check_constant(losses, members)
    return linear_group_type(names)(reduce(losses, reduction), members.detach(), *statistics)

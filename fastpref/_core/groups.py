"""Checks of the groups, the reference model and the loss function of a loss from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastpref._core.checks import FLOATING, check_bool, check_int, check_vector, describe
from fastpref._core.preference import Preference, PreferenceOptions, resolve_preference
from fastpref._core.resolve import LinearBatch, Operands
from fastpref._core.sequences import count_sequences, sequence_lengths

LossFunction = Callable[[Tensor], Tensor]
"""A function from log-probs (G, K) to losses (G,), in which each loss depends on its own group only."""


def like_pairs(labels: Tensor, cu_seqlens: Tensor | None) -> tuple[str, Tensor]:
    """Return the `like` of `check_vector` for labels [chosen; rejected]: a name, and a tensor (B,) for B pairs."""
    return "labels", labels.new_empty(count_sequences(labels, cu_seqlens) // 2)


def check_halves(labels: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise `ValueError` unless the sequences can be [chosen; rejected]."""
    sequences = count_sequences(labels, cu_seqlens)
    if sequences % 2:
        raise ValueError(
            f"hidden and labels must hold [chosen; rejected], an even number of sequences; got {sequences}"
        )


class Reference(NamedTuple):
    """The reference model of a preference loss from hidden states, as a call gives it: either log-probs or a head."""

    chosen_logps: Tensor | None
    rejected_logps: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def operands(self) -> Operands:
        """Return the reference's hidden states and head."""
        assert self.hidden is not None
        assert self.weight is not None
        return Operands(self.hidden, self.weight, self.bias)

    def check(self, batch: LinearBatch, needed: bool) -> None:
        """Raise unless the reference is given once: as log-probs, or as hidden states with a head.

        Args:
            batch: the policy's batch, for the number of pairs.
            needed: whether the loss compares with a reference.
        """
        logps = {"ref_chosen_logps": self.chosen_logps, "ref_rejected_logps": self.rejected_logps}
        states = {"ref_hidden": self.hidden, "ref_weight": self.weight, "ref_bias": self.bias}
        for name, value in logps.items():
            if value is not None:
                like = like_pairs(batch.labels, batch.cu_seqlens)
                check_vector(name, value, FLOATING, "a floating-point tensor (B,)", like)
        given = [name for name, value in logps.items() if value is not None]
        made = [name for name, value in states.items() if value is not None]
        if given and made:
            raise ValueError(
                f"pass the reference's log-probs or its hidden states, not both; "
                f"got {', '.join(given)} and {', '.join(made)}"
            )
        if made and (self.hidden is None or self.weight is None):
            missing = "ref_hidden" if self.hidden is None else "ref_weight"
            raise ValueError(f"a reference from hidden states needs {missing}; got only {', '.join(made)}")
        if not made and len(given) < 2 and needed:
            missing = ", ".join(name for name in logps if name not in given)
            raise ValueError(f"the loss needs {missing}, or ref_hidden and ref_weight, or reference_free=True")


def check_group(
    labels: Tensor, cu_seqlens: Tensor | None, group_size: int, ld_alpha: float | None, shared_lengths: Tensor | None
) -> int:
    """Return `group_size`, or raise unless it divides the number of sequences and LD-DPO's lengths are known."""
    group_size = check_int("group_size", group_size, least=1)
    sequences = count_sequences(labels, cu_seqlens)
    if sequences % group_size:
        raise ValueError(f"group_size must divide the number of sequences, {sequences}; got {group_size}")
    if ld_alpha is not None and shared_lengths is None and group_size != 2:
        raise ValueError(f"ld_alpha without shared_lengths needs pairs, group_size=2; got group_size={group_size}")
    return group_size


def resolve_pair_options(options: PreferenceOptions, batch: LinearBatch, average_logps: bool) -> Preference:
    """Check the options of `dpo_loss` before any product is computed, and count the lengths that are needed.

    Args:
        options: the options, unchecked.
        batch: the batch of pairs [chosen; rejected].
        average_logps: whether log-probs are means, which must not be divided by lengths again.
    """
    check_bool("average_logps", average_logps)
    preference = resolve_preference(options, like_pairs(batch.labels, batch.cu_seqlens))
    needed = preference.needs_chosen_lengths, preference.needs_rejected_lengths
    if average_logps and any(needed):
        names = ", ".join(kind.name for kind, _ in preference.types)
        raise ValueError(
            f"average_logps=True takes means, and loss_type {names} with length_normalize={options.length_normalize!r} "
            f"and sft_weight={options.sft_weight!r} divides by lengths itself"
        )
    given = options.chosen_lengths, options.rejected_lengths
    if not any(wanted and length is None for wanted, length in zip(needed, given, strict=True)):
        return preference
    counts = sequence_lengths(batch.scored, batch.cu_seqlens, batch.sequences()).tensor_split(2)
    chosen, rejected = (counted if length is None else length for length, counted in zip(given, counts, strict=True))
    return preference.replace(chosen_lengths=chosen, rejected_lengths=rejected)


def check_losses(losses: object, groups: int) -> None:
    """Raise unless `loss_fn` returned floating-point losses (G,)."""
    if not isinstance(losses, Tensor) or losses.dtype not in FLOATING:
        raise TypeError(f"loss_fn must return a floating-point tensor ({groups},); got {describe(losses)}")
    if losses.shape != (groups,):
        raise ValueError(f"loss_fn must return one loss per group, ({groups},); got {describe(losses)}")


def check_constant(losses: Tensor, members: Tensor) -> None:
    """Raise `ValueError` if the losses depend on a tensor besides `members` that requires a gradient.

    Such a tensor would get no gradient if the gradients are computed in the forward, and would get one if the log-probs
    are computed first. So a short batch would train it, and a longer one would not.
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

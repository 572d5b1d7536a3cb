"""Arguments that the losses from hidden states refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastpref
from tests.helpers.linear_preference import PAIRS, make, pack, plackett_luce

OPERANDS, LABELS = make()
REF = torch.zeros(PAIRS, dtype=torch.float64)
PACKED, PACKED_LABELS, BOUNDS = pack(OPERANDS["hidden"], LABELS)
GIVEN: dict[str, Any] = {"ref_chosen_logps": REF, "ref_rejected_logps": REF}
HIDDEN_REF: dict[str, Any] = {"ref_hidden": OPERANDS["hidden"], "ref_weight": OPERANDS["weight"]}
# What is wrong: the arguments that differ from a good call, the error, and what its text must hold.
REFUSED_DPO: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "no reference": ({}, ValueError, ("ref_chosen_logps", "ref_hidden", "reference_free")),
    "half a reference": ({"ref_chosen_logps": REF}, ValueError, ("ref_rejected_logps", "reference_free")),
    "both references": ({**GIVEN, **HIDDEN_REF}, ValueError, ("not both", "ref_chosen_logps", "ref_hidden")),
    "both references, free": (
        {**GIVEN, **HIDDEN_REF, "reference_free": True},
        ValueError,
        ("not both", "ref_rejected_logps", "ref_weight"),
    ),
    "ref_hidden alone": ({"ref_hidden": OPERANDS["hidden"]}, ValueError, ("ref_weight", "ref_hidden")),
    "ref_weight alone": ({"ref_weight": OPERANDS["weight"]}, ValueError, ("ref_hidden", "ref_weight")),
    "ref_bias alone": ({"ref_bias": OPERANDS["bias"]}, ValueError, ("ref_hidden", "ref_bias")),
    "ref_bias beside log-probs": ({**GIVEN, "ref_bias": OPERANDS["bias"]}, ValueError, ("not both", "ref_bias")),
    "ref_hidden of another shape": (
        {**HIDDEN_REF, "ref_hidden": OPERANDS["hidden"][:, 1:]},
        ValueError,
        ("labels", "ref_hidden", "(6, 6)"),
    ),
    "ref_weight of another width": (
        {**HIDDEN_REF, "ref_weight": OPERANDS["weight"][:, 1:]},
        ValueError,
        ("ref_weight", "ref_hidden", "(23, 4)"),
    ),
    "ref_weight of another dtype": (
        {**HIDDEN_REF, "ref_weight": OPERANDS["weight"].float()},
        TypeError,
        ("ref_weight", "torch.float32"),
    ),
    "an odd number of sequences": (
        {**GIVEN, "hidden": OPERANDS["hidden"][:5], "labels": LABELS[:5]},
        ValueError,
        ("even", "5", "rejected"),
    ),
    "an odd number of packed sequences": (
        {**GIVEN, "hidden": PACKED, "labels": PACKED_LABELS, "cu_seqlens": BOUNDS[[0, 1, 2, 6]]},
        ValueError,
        ("even", "3"),
    ),
    "one sequence": (
        {**GIVEN, "hidden": OPERANDS["hidden"][0], "labels": LABELS[0]},
        ValueError,
        ("even", "1", "rejected"),
    ),
    "references of another length": ({**GIVEN, "ref_chosen_logps": REF[:2]}, ValueError, ("ref_chosen_logps", "(2,)")),
    "references of integers": ({**GIVEN, "ref_chosen_logps": REF.long()}, TypeError, ("ref_chosen_logps", "int64")),
    "beta 0": ({**GIVEN, "beta": 0.0}, ValueError, ("beta", "0.0", "above 0")),
    "loss_type unknown": ({**GIVEN, "loss_type": "sigmoidal"}, ValueError, ("loss_type", "'sigmoidal'", "'sigmoid'")),
    "label_smoothing 2": ({**GIVEN, "label_smoothing": 2.0}, ValueError, ("label_smoothing", "2.0")),
    "reduction unknown": ({**GIVEN, "reduction": "max"}, ValueError, ("reduction", "'max'", "'none'")),
    "weight of another width": ({**GIVEN, "weight": OPERANDS["weight"][:, 1:]}, ValueError, ("weight", "(23, 4)")),
    "bias elsewhere": ({**GIVEN, "bias": OPERANDS["bias"].to("meta")}, ValueError, ("bias", "meta", "cpu")),
    "mode unknown": ({**GIVEN, "mode": "fast"}, ValueError, ("mode", "'fast'", "'save'")),
    "chunk_rows 0": ({**GIVEN, "chunk_rows": 0}, ValueError, ("chunk_rows", "0")),
    "a statistic unknown": ({**GIVEN, "stats": ("kl",)}, ValueError, ("stats", "'kl'", "'dropped_mass'")),
    "shared_lengths without ld_alpha": (
        {**GIVEN, "shared_lengths": LABELS[:, 0]},
        ValueError,
        ("shared_lengths", "ld_alpha"),
    ),
}
REFUSED_GROUPS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "groups that do not divide": ({"group_size": 4}, ValueError, ("group_size", "4", "6")),
    "group_size 0": ({"group_size": 0}, ValueError, ("group_size", "0", "1 or more")),
    "group_size a float": ({"group_size": 3.0}, TypeError, ("group_size", "3.0", "int")),
    "one loss for all": ({"loss_fn": lambda a: a.sum()}, ValueError, ("loss_fn", "shape ()", "(2,)")),
    "a loss for each member": ({"loss_fn": lambda a: a}, ValueError, ("loss_fn", "shape (2, 3)", "(2,)")),
    "no tensor": ({"loss_fn": lambda a: 1.0}, TypeError, ("loss_fn", "float 1.0", "(2,)")),
    "a tensor of bools": ({"loss_fn": lambda a: a[:, 0] > 0}, TypeError, ("loss_fn", "torch.bool", "(2,)")),
    "halves of three": ({"ld_alpha": 0.5}, ValueError, ("ld_alpha", "shared_lengths", "group_size=3")),
    "reduction unknown": ({"reduction": "max"}, ValueError, ("reduction", "'max'", "'none'")),
    "hidden of one dimension": ({"hidden": OPERANDS["bias"]}, ValueError, ("hidden", "(23,)", "(B, T, H)")),
}


@pytest.mark.parametrize(("changed", "kind", "words"), REFUSED_DPO.values(), ids=REFUSED_DPO)
def test_dpo_refuses(changed: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        fastpref.linear_dpo_loss(**{**OPERANDS, "labels": LABELS, **changed})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("changed", "kind", "words"), REFUSED_GROUPS.values(), ids=REFUSED_GROUPS)
def test_groups_refuse(changed: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    arguments = {**OPERANDS, "labels": LABELS, "loss_fn": plackett_luce, "group_size": 3, **changed}
    with pytest.raises(kind) as caught:
        fastpref.linear_preference_loss(**arguments)
    for word in words:
        assert word in str(caught.value)

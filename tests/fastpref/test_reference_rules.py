"""The definitions import nothing of ours, have the options of the public functions, and refuse unknown names."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import nn, reference
from fastpref._core.preference import PreferenceOptions

FOLDER = Path(inspect.getfile(reference)).parent
LOGITS, LABELS = torch.randn(2, 4, 5), torch.tensor([[0, 1, 4, 2], [3, 1, 0, 1]])
WEIGHT, HIDDEN = torch.randn(5, 3), torch.randn(2, 4, 3)
X, ONES, MASK = torch.zeros(2), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_nothing_else_of_ours_is_imported(path: Path) -> None:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    ours = [name for name in names if name.startswith("fastpref")]
    assert all(name.startswith("fastpref.reference") for name in ours), ours


def test_the_bundle_has_the_options_of_dpo_loss() -> None:
    def options(function: Callable[..., Any]) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {x.name: x.default for x in parameters if x.kind is x.KEYWORD_ONLY}

    assert PreferenceOptions._field_defaults == options(fastpref.dpo_loss)
    assert options(nn.DPOLoss).items() <= PreferenceOptions._field_defaults.items()
    assert PreferenceOptions._field_defaults.items() <= options(fastpref.linear_dpo_loss).items()


@pytest.mark.parametrize("label", [-1, 5])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_scored_label_outside_of_the_vocabulary_is_an_index_error(kind: str, label: int) -> None:
    labels = LABELS.clone()
    labels[1, 2] = label
    calls: list[tuple[str, tuple[Tensor, ...]]] = [("", (LOGITS,)), ("linear_", (HIDDEN, WEIGHT))]
    for prefix, first in calls:
        with pytest.raises(IndexError, match=rf"label {label} at scored position \[1, 1\] is outside \[0, 5\)"):
            getattr(reference, f"{prefix}{kind}_logprobs")(*first, labels)
        getattr(reference, f"{prefix}{kind}_logprobs")(*first, labels, ignore_index=label)


UNKNOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "statistic": (lambda: reference.token_logprobs(LOGITS, LABELS, stats=("kl",)), "stats .*'lse'.*'kl'"),
    "statistic of no logits": (
        lambda: reference.sequence_logprobs(LOGITS, LABELS, stats=("dropped_mass",)),
        "stats .*'dropped_mass'",
    ),
    "statistic of hidden states": (
        lambda: reference.linear_token_logprobs(HIDDEN, WEIGHT, LABELS, stats=("kl",)),
        "stats .*'dropped_mass'.*'kl'",
    ),
    "reduction of tokens": (
        lambda: reference.sequence_logprobs(LOGITS, LABELS, reduction="none"),
        "reduction .*'none'",
    ),
    "boundaries": (
        lambda: reference.sequence_logprobs(LOGITS[0], LABELS[0], cu_seqlens=torch.tensor([0, 3])),
        r"cu_seqlens .* 4; ",
    ),
    "halves": (lambda: reference.sequence_logprobs(LOGITS[:1], LABELS[:1], ld_alpha=0.5), "ld_alpha .* even number"),
    "loss_type": (lambda: reference.dpo_loss(X, X, X, X, loss_type="dpo"), "loss_type .*'sigmoid'.*'dpo'"),
    "f_divergence": (lambda: reference.dpo_loss(X, X, X, X, f_divergence="kl"), "f_divergence .*'js'.*'kl'"),
    "sft_reduction": (
        lambda: reference.dpo_loss(X, X, loss_type="sft", chosen_lengths=X, sft_reduction="mean"),
        "sft_reduction .*'token'.*'mean'",
    ),
    "no reference": (lambda: reference.dpo_loss(X, X), "ref_chosen_logps"),
    "no lengths": (lambda: reference.dpo_loss(X, X, loss_type="simpo"), "lengths"),
    "reduction of pairs": (lambda: reference.kto_loss(X, X, X > 0, kl=0.0, reduction="max"), "reduction .*'max'"),
    "reduction of rankings": (lambda: reference.ranking_loss(ONES, MASK.long(), reduction="max"), "reduction .*'max'"),
    "reduction of a mean": (
        lambda: reference.ptx_loss(ONES, MASK, reduction="mean"),
        "reduction .*'token'.*'mean'",
    ),
    "estimator": (
        lambda: reference.kl_shaped_rewards(X, ONES, ONES, MASK, kl_coef=1.0, estimator="k4"),
        "estimator .*'k4'",
    ),
}


@pytest.mark.parametrize(("call", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_name_is_an_error(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


class TestTop2Margin:
    @staticmethod
    def of(rows: list[list[float]], **options: Any) -> Tensor:
        logits = torch.tensor(rows, dtype=torch.float64).requires_grad_()
        labels = torch.zeros(len(rows), dtype=torch.long)
        margin = reference.token_logprobs(logits, labels, shift=False, stats=("top2_margin",), **options).top2_margin
        assert not margin.requires_grad
        return margin

    def test_is_the_distance_of_the_two_best(self) -> None:
        rows = [[1.0, 4.0, 2.5], [-math.inf, 7.0, 3.0], [0.0, -math.inf, -math.inf]]
        assert self.of(rows).tolist() == [1.5, 4.0, math.inf]

    def test_is_zero_on_ties(self) -> None:
        assert self.of([[2.0, 3.0, 3.0], [1.0, 1.0, 1.0]]).tolist() == [0.0, 0.0]

    def test_is_infinite_for_one_column_and_zero_where_ignored(self) -> None:
        assert self.of([[2.0], [3.0]]).tolist() == [math.inf, math.inf]
        assert self.of([[2.0, 5.0]], ignore_index=0).tolist() == [0.0]

    def test_is_of_the_transformed_logits(self) -> None:
        assert self.of([[1.0, 4.0, 2.0]], temperature=4.0).tolist() == [0.5]

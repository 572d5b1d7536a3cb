"""Preference losses from hidden states against the loss of the log-probs of the product, every loss type included."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.losses import LOSS_TYPES
from tests.helpers.linear_preference import (
    PAIRS,
    TIME,
    VOCABULARY,
    assert_near,
    composed,
    gradients,
    incoming,
    leaves_of,
    make,
    pack,
    plackett_luce,
)
from tests.helpers.marks import both, packages
from tests.tolerance import ALL_STATS, assert_accurate

FIELDS = ("loss", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps")
# label_smoothing, average_logps, ld_alpha: any two of them in all four ways.
COMBINATIONS = ((0.0, False, None), (0.2, True, None), (0.0, True, 0.3), (0.2, False, 0.3))


class TestDpoAgainstTheDefinition:
    @packages
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize("source", ["log-probs", "hidden states", "free"])
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    def test_every_combination(
        self, packed: bool, reduction: str, source: str, dtype: torch.dtype, package: Any
    ) -> None:
        operands, labels = make(dtype=dtype)
        others, _ = make(dtype=dtype, seed=1)
        shared: dict[str, Any] = {"stats": ("lse", "is_top1"), "reduction": reduction}
        if packed:
            others["hidden"], _, _ = pack(others["hidden"], labels)
            operands["hidden"], labels, shared["cu_seqlens"] = pack(operands["hidden"], labels)
        for smoothing, average, alpha in COMBINATIONS:
            options = {**shared, "label_smoothing": smoothing, "beta": 0.3, "ld_alpha": alpha}
            ref = composed(others, labels, average, options).chunk(2)
            truth_leaves = leaves_of(operands, torch.float64)
            chosen, rejected = composed(truth_leaves, labels, average, options).chunk(2)
            given = {} if source == "free" else {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
            truth = reference.dpo_loss(
                chosen,
                rejected,
                **given,
                beta=0.3,
                label_smoothing=smoothing,
                reduction=reduction,
                reference_free=source == "free",
            )
            truth.loss.backward(incoming(truth.loss))
            wanted = {**dict(zip(FIELDS, (*truth, chosen, rejected), strict=True)), **gradients(truth_leaves)}
            if source == "log-probs":
                options |= {name: value.to(dtype) for name, value in given.items()}
            elif source == "hidden states":
                options |= {f"ref_{name}": value for name, value in others.items()}
            else:
                options["reference_free"] = True
            # Shorter than a pair, than all the pairs, and what is chosen for us; to the reference they are one.
            for chunk_rows in (1, 12, None) if package is fastpref and dtype == torch.float32 else (12,):
                leaves = leaves_of(operands)
                found = package.linear_dpo_loss(
                    leaves["hidden"],
                    leaves["weight"],
                    labels,
                    bias=leaves["bias"],
                    average_logps=average,
                    chunk_rows=chunk_rows,
                    **options,
                )
                assert found._fields == (*FIELDS, "lse", "is_top1")
                found.loss.backward(incoming(found.loss))
                values = {**found._asdict(), **gradients(leaves)}
                for name, value in wanted.items():
                    assert_near(values[name], value, dtype, name)
                torch.testing.assert_close(found.margins, found.chosen_rewards - found.rejected_rewards)
                assert torch.equal(found.accuracies, (found.chosen_rewards > found.rejected_rewards).to(dtype))

    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_statistics_are_the_log_probs_functions(self, chunk_rows: int | None) -> None:
        operands, labels = make()
        stats = (*ALL_STATS, "dropped_mass")
        arguments = operands["hidden"], operands["weight"], labels
        wanted = reference.linear_token_logprobs(*arguments, operands["bias"], stats=stats)
        found = fastpref.linear_dpo_loss(
            *arguments, bias=operands["bias"], stats=stats, reference_free=True, chunk_rows=chunk_rows
        )
        assert found._fields == (*FIELDS, *stats)
        for name in stats:
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name))

    @both
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    @pytest.mark.parametrize("mode", ["auto", "recompute"])
    def test_gradients_in_every_dtype(self, mode: str, chunk_rows: int | None, dtype: torch.dtype) -> None:
        operands, labels = make(dtype=dtype)

        def outcome(package: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
            leaves = leaves_of(operands, dtype)
            found = package.linear_dpo_loss(
                leaves["hidden"],
                leaves["weight"],
                labels,
                bias=leaves["bias"],
                reference_free=True,
                mode=mode,
                chunk_rows=chunk_rows,
            )
            found.loss.backward(incoming(found.loss))
            return found, gradients(leaves)

        truth, true_gradients = outcome(reference, torch.float64)
        _, eager = outcome(reference, dtype)
        ours, found = outcome(fastpref, dtype)
        for name, value in ours._asdict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), getattr(truth, name), rtol=1e-5, atol=1e-4)
        for name, value in found.items():
            summed = true_gradients[name].abs().max().item() * 4  # a pair's two sides cancel
            assert_accurate(value, eager[name], true_gradients[name], name, summed=summed)

    @both
    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_a_loss_scale_comes_last(self, chunk_rows: int | None) -> None:
        """A gradient too small for float16 is kept under a GradScaler's factor."""
        operands, labels = make(dtype=torch.float16)

        def outcome(package: Any, dtype: torch.dtype, scale: float) -> dict[str, Tensor]:
            leaves = leaves_of(operands, dtype)
            found = package.linear_dpo_loss(
                leaves["hidden"],
                leaves["weight"],
                labels,
                bias=leaves["bias"],
                reference_free=True,
                beta=1e-6,
                chunk_rows=chunk_rows,
            )
            (found.loss * scale).backward()
            return gradients(leaves)

        truth = outcome(reference, torch.float64, 65536.0)
        eager = outcome(reference, torch.float16, 65536.0)
        for name, value in outcome(fastpref, torch.float16, 65536.0).items():
            assert value.any()
            assert_accurate(value, eager[name], truth[name], name, summed=truth[name].abs().max().item() * 4)

    @pytest.mark.parametrize("options", [{"softcap": 2.0, "temperature": 0.7, "logit_scale": 0.4}, {"shift": False}])
    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_scoring_options_hold_for_the_policy_and_the_reference(
        self, chunk_rows: int | None, options: dict[str, Any]
    ) -> None:
        operands, labels = make()
        others, _ = make(seed=1)
        refs = {f"ref_{name}": value for name, value in others.items()}
        results = []
        for package in (fastpref, reference):
            leaves = leaves_of(operands)
            found = package.linear_dpo_loss(
                leaves["hidden"],
                leaves["weight"],
                labels,
                bias=leaves["bias"],
                **refs,
                chunk_rows=chunk_rows,
                **options,
            )
            found.loss.backward()
            results.append({**found._asdict(), **gradients(leaves)})
        for name, value in results[1].items():
            assert_near(results[0][name], value.detach(), torch.float64, name)

    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_shared_lengths(self, chunk_rows: int | None) -> None:
        operands, labels = make()
        options = {"ld_alpha": 0.4, "shared_lengths": torch.tensor([1, 2, 3, 100, 0, 1])}
        found = fastpref.linear_dpo_loss(
            operands["hidden"],
            operands["weight"],
            labels,
            bias=operands["bias"],
            reference_free=True,
            chunk_rows=chunk_rows,
            **options,
        )
        logps = composed(operands, labels, False, options)
        torch.testing.assert_close(torch.cat((found.chosen_logps, found.rejected_logps)), logps)

    def test_no_bias_and_a_reference_of_another_width(self) -> None:
        operands, labels = make()
        others = torch.randn(2 * PAIRS, TIME, 11).double(), torch.randn(VOCABULARY, 11).double()
        found = fastpref.linear_dpo_loss(
            operands["hidden"], operands["weight"], labels, ref_hidden=others[0], ref_weight=others[1]
        )
        logps = reference.sequence_logprobs(operands["hidden"] @ operands["weight"].T, labels).chunk(2)
        refs = reference.sequence_logprobs(others[0] @ others[1].T, labels).chunk(2)
        for got, wanted in zip(found, reference.dpo_loss(*logps, *refs), strict=False):
            torch.testing.assert_close(got, wanted)

    def test_reference_free_ignores_what_is_given(self) -> None:
        operands, labels = make()
        arguments = operands["hidden"], operands["weight"], labels
        wanted = fastpref.linear_dpo_loss(*arguments, reference_free=True)
        given = torch.full((PAIRS,), 9.0, dtype=torch.float64)
        found = fastpref.linear_dpo_loss(*arguments, given, given, reference_free=True)
        made = fastpref.linear_dpo_loss(
            *arguments, reference_free=True, ref_hidden=arguments[0], ref_weight=arguments[1]
        )
        for a, b, c in zip(wanted, found, made, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


class TestGroupsAgainstTheDefinition:
    @packages
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    def test_plackett_luce_of_three(self, packed: bool, reduction: str, dtype: torch.dtype, package: Any) -> None:
        operands, labels = make(6, dtype)
        options: dict[str, Any] = {}
        if packed:
            operands["hidden"], labels, options["cu_seqlens"] = pack(operands["hidden"], labels)
        lengths = torch.tensor([1, 2, 3, 4, 0, 1])
        for average, ld in itertools.product((False, True), ({}, {"ld_alpha": 0.3, "shared_lengths": lengths})):
            truth_leaves = leaves_of(operands, torch.float64)
            logps = composed(truth_leaves, labels, average, {**options, **ld})
            groups = torch.stack((logps[0::2], logps[1::2]))  # sequence k·G + i is member k of group i, and G is 2
            losses = plackett_luce(groups)
            loss = {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]
            loss.backward(incoming(loss))
            wanted = {"loss": loss, "logps": groups, **gradients(truth_leaves)}
            for chunk_rows in (1, 18, None) if package is fastpref and dtype == torch.float32 else (18,):
                leaves = leaves_of(operands)
                found = package.linear_preference_loss(
                    leaves["hidden"],
                    leaves["weight"],
                    labels,
                    plackett_luce,
                    bias=leaves["bias"],
                    group_size=3,
                    reduction=reduction,
                    average_logps=average,
                    stats=("entropy",),
                    chunk_rows=chunk_rows,
                    **options,
                    **ld,
                )
                assert found._fields == ("loss", "logps", "entropy")
                found.loss.backward(incoming(found.loss))
                values = {**found._asdict(), **gradients(leaves)}
                for name, value in wanted.items():
                    assert_near(values[name], value, dtype, name)

    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_of_pairs_it_is_dpo(self, chunk_rows: int | None) -> None:
        operands, labels = make()
        results = []
        for name, arguments in (
            (
                "linear_preference_loss",
                {"loss_fn": lambda a: -F.logsigmoid(0.1 * (a[:, 0] - a[:, 1])), "group_size": 2},
            ),
            ("linear_dpo_loss", {"reference_free": True}),
        ):
            leaves = leaves_of(operands)
            found = getattr(fastpref, name)(
                leaves["hidden"],
                leaves["weight"],
                labels,
                bias=leaves["bias"],
                ld_alpha=0.5,
                chunk_rows=chunk_rows,
                **arguments,
            )
            found.loss.backward()
            results.append({"loss": found.loss, **gradients(leaves)})
        for name, value in results[0].items():
            assert_near(value, results[1][name].detach(), torch.float64, name)

    @pytest.mark.parametrize("group_size", [1, 6])
    @pytest.mark.parametrize("chunk_rows", [None, 1])
    def test_groups_of_one_and_of_all(self, chunk_rows: int | None, group_size: int) -> None:
        operands, labels = make()
        found = fastpref.linear_preference_loss(
            operands["hidden"],
            operands["weight"],
            labels,
            lambda a: a.exp().sum(-1),
            bias=operands["bias"],
            group_size=group_size,
            reduction="none",
            chunk_rows=chunk_rows,
        )
        logps = composed(operands, labels, False, {}).view(group_size, -1).T
        torch.testing.assert_close(found.logps, logps)
        torch.testing.assert_close(found.loss, logps.exp().sum(-1))


PER_PAIR = torch.linspace(0.5, 1.5, PAIRS, dtype=torch.float64)
REFS = -10 * torch.rand(2, PAIRS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
# 9 scored rows a pair at the most: all pairs in one chunk, one pair a chunk, and no whole pair in any.
chunks = pytest.mark.parametrize("chunk_rows", [None, 11, 4])


def cases(name: str) -> list[dict[str, Any]]:
    """Return options of the plain type, and of the type with every option that it takes."""
    plain: dict[str, Any] = {"loss_type": name}
    if name == "exo_pair":
        plain["label_smoothing"] = 0.2
    takes = LOSS_TYPES[name].takes
    full: dict[str, Any] = {
        "margin": PER_PAIR,
        "weights": PER_PAIR.flip(0),
        "length_normalize": True,
        "f_divergence": "js",
        "label_smoothing": 0.1,
        "delta": 0.2,
        "gamma": 0.8,
        "discopop_tau": 0.5,
    }
    full = {option: value for option, value in full.items() if option in takes}
    if name != "sft":
        full |= {"sft_weight": 0.4, "sft_reduction": "sequence"}
    return [plain, {**plain, **full, "beta": 0.3}]


def evaluate(package: Any, dtype: torch.dtype, *, packed: bool = False, **options: Any) -> dict[str, Tensor]:
    operands, labels = make()
    leaves = leaves_of(operands, dtype)
    hidden: Tensor = leaves["hidden"]
    where = {}
    if packed:
        hidden, labels, where["cu_seqlens"] = pack(hidden, labels)
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    out = package.linear_dpo_loss(
        hidden, leaves["weight"], labels, *REFS.to(dtype), bias=leaves["bias"], **where, **given
    )
    out.loss.backward()
    return {**out._asdict(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


@chunks
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_every_type(name: str, packed: bool, chunk_rows: int | None) -> None:
    for options in cases(name):
        ours = evaluate(fastpref, torch.float32, packed=packed, chunk_rows=chunk_rows, **options)
        truth = evaluate(reference, torch.float64, **options)
        for field, value in truth.items():
            assert_near(ours[field], value, torch.float32, field)


@chunks
def test_several_types(chunk_rows: int | None) -> None:
    options: dict[str, Any] = {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 0.5)}
    ours = evaluate(fastpref, torch.float32, chunk_rows=chunk_rows, **options)
    truth = evaluate(reference, torch.float64, **options)
    for field, value in truth.items():
        assert_near(ours[field], value, torch.float32, field)


@packages
def test_lengths_are_the_numbers_of_scored_labels_unless_given(package: Any) -> None:
    _, labels = make()
    counted = (labels[:, 1:] != -100).sum(1)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), counted.chunk(2), strict=True))
    loss = evaluate(package, torch.float64, loss_type="simpo")["loss"]
    assert torch.equal(loss, evaluate(package, torch.float64, loss_type="simpo", **lengths)["loss"])
    lengths["chosen_lengths"] = lengths["chosen_lengths"] + 1
    assert not torch.equal(loss, evaluate(package, torch.float64, loss_type="simpo", **lengths)["loss"])


@pytest.mark.parametrize(
    "options", [{"loss_type": "orpo"}, {"sft_weight": 0.1}, {"length_normalize": True}, {"loss_type": "sft"}]
)
def test_means_are_not_divided_again(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"average_logps=True takes means, and loss_type .* divides by lengths"):
        evaluate(fastpref, torch.float32, average_logps=True, **options)


@packages
def test_types_without_a_reference_need_none_and_ignore_one(package: Any) -> None:
    operands, labels = make()
    call = (operands["hidden"], operands["weight"], labels)
    alone = package.linear_dpo_loss(*call, loss_type="cpo")
    with_one = package.linear_dpo_loss(*call, *REFS, loss_type="cpo")
    assert torch.equal(alone.loss, with_one.loss)
    assert torch.equal(alone.chosen_rewards, with_one.chosen_rewards)
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        package.linear_dpo_loss(*call, loss_type=("cpo", "sigmoid"))

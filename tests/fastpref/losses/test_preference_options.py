"""The options of `dpo_loss`: likelihood terms, weights, lengths, lists of types, and what each type refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import dpo_loss, nn, reference
from tests.helpers.dpo import (
    BUT_SFT,
    FREE,
    LOG2,
    NORMALIZED,
    REFERENCED,
    SORTED,
    TYPES,
    check,
    example,
    required,
    taking,
)
from tests.helpers.marks import wide_dtypes


class TestSft:
    w, n = torch.tensor([-4.0, -6.0], dtype=torch.float64), torch.tensor([2, 8])

    @pytest.mark.parametrize(
        ("reduction", "wanted", "slope"),
        [
            ("token", 1.0, [-0.1, -0.1]),
            ("sequence", 1.375, [-1 / 4, -1 / 16]),
        ],
    )
    def test_alone(self, reduction: str, wanted: float, slope: list[float]) -> None:
        w = self.w.clone().requires_grad_()
        result = dpo_loss(w, w - 1, loss_type="sft", chosen_lengths=self.n, sft_reduction=reduction)
        assert result.loss.item() == pytest.approx(wanted, rel=1e-14)
        assert torch.autograd.grad(result.loss, w)[0].tolist() == pytest.approx(slope, rel=1e-14)
        assert result.chosen_rewards.tolist() == pytest.approx([-0.4, -0.6])

    def test_needs_no_lengths_of_the_rejected(self) -> None:
        zero = torch.zeros(2, dtype=torch.float64)
        got = dpo_loss(self.w, zero, zero, zero, sft_weight=0.5, chosen_lengths=self.n)
        plain = dpo_loss(self.w, zero, zero, zero)
        assert got.loss.item() == pytest.approx(plain.loss.item() + 0.5, rel=1e-14)

    @pytest.mark.parametrize("kind", BUT_SFT)
    @pytest.mark.parametrize("how", ["token", "sequence"])
    def test_added(self, kind: str, how: str) -> None:
        columns, lengths = example(4, 8)
        check(kind, columns, lengths, "mean", sft_weight=0.75, sft_reduction=how, **required(kind))

    @pytest.mark.parametrize("how", ["token", "sequence"])
    @pytest.mark.parametrize("loss", [{"loss_type": "sft"}, {"sft_weight": 2.0}])
    def test_mean_of_each_is_the_mean(self, how: str, loss: dict[str, Any]) -> None:
        columns, lengths = example(4, 9)
        options = {**loss, "sft_reduction": how, "chosen_lengths": lengths[0]}
        leaf = columns[0].requires_grad_()
        results = {r: dpo_loss(leaf, *columns[1:], reduction=r, **options).loss for r in ("none", "sum", "mean")}
        slopes = {r: torch.autograd.grad(x.sum(), leaf)[0] for r, x in results.items()}
        torch.testing.assert_close(results["none"].sum() / 4, results["mean"], rtol=1e-14, atol=0)
        torch.testing.assert_close(results["sum"] / 4, results["mean"], rtol=1e-14, atol=0)
        torch.testing.assert_close(slopes["none"] / 4, slopes["mean"], rtol=1e-14, atol=0)
        torch.testing.assert_close(slopes["sum"] / 4, slopes["mean"], rtol=1e-14, atol=0)

    @pytest.mark.parametrize("n", [[0, 4], [0, 0]])
    def test_no_tokens(self, n: list[int]) -> None:
        w = torch.tensor([0.0, -8.0 if n[1] else 0.0])
        token = dpo_loss(w, w, loss_type="sft", chosen_lengths=torch.tensor(n)).loss
        each = dpo_loss(w, w, loss_type="sft", chosen_lengths=torch.tensor(n), sft_reduction="sequence").loss
        # Both tokens means count four tokens, not a fifth for the empty sequence.
        assert (token.item(), each.item()) == ((2.0, 1.0) if n[1] else (0.0, 0.0))


class TestOptions:
    def test_weights_multiply_and_the_mean_divides_by_the_batch(self) -> None:
        columns, _ = example(4)
        weights = torch.tensor([0.0, 3.0, 0.5, 0.5], dtype=torch.float64).requires_grad_()
        plain = dpo_loss(*columns, reduction="none").loss
        got = dpo_loss(*(c.requires_grad_() for c in columns), weights=weights)
        torch.testing.assert_close(got.loss, (plain * weights).sum() / 4, rtol=1e-14, atol=0)
        got.loss.backward()
        assert weights.grad is None
        assert columns[0].grad is not None
        assert columns[0].grad[0] == 0

    def test_weights_leave_the_rewards_alone(self) -> None:
        columns, _ = example(3)
        plain, weighted = dpo_loss(*columns), dpo_loss(*columns, weights=torch.tensor([0.0, 2.0, 3.0]).double())
        assert torch.equal(plain.chosen_rewards, weighted.chosen_rewards)
        assert torch.equal(plain.rejected_rewards, weighted.rejected_rewards)

    @pytest.mark.parametrize("kind", REFERENCED)
    def test_reference_free_ignores_what_is_given(self, kind: str) -> None:
        columns, lengths = example(4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        options = {"loss_type": kind, "reduction": "none", **required(kind), **n}
        zeros = [torch.zeros(4, dtype=torch.float64)] * 2
        wanted = dpo_loss(*columns[:2], *zeros, **options)
        for got in (
            dpo_loss(*columns[:2], reference_free=True, **options),
            dpo_loss(*columns, reference_free=True, **options),
        ):
            for a, b in zip(wanted, got, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("kind", FREE)
    def test_types_without_a_reference_ignore_it(self, kind: str) -> None:
        columns, lengths = example(4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        with_it = dpo_loss(*columns, loss_type=kind, **n)
        without = dpo_loss(*columns[:2], loss_type=kind, **n)
        for a, b in zip(with_it, without, strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(with_it.chosen_rewards, 0.1 * columns[0])
        torch.testing.assert_close(with_it.rejected_rewards, 0.1 * columns[1])

    @pytest.mark.parametrize("kind", REFERENCED)
    def test_the_others_need_it(self, kind: str) -> None:
        columns, lengths = example(2)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        with pytest.raises(ValueError, match=rf"(?s){kind}.*ref_chosen_logps.*reference_free"):
            dpo_loss(*columns[:2], loss_type=kind, **required(kind), **n)
        with pytest.raises(ValueError, match=rf"(?s){kind}.*ref_rejected_logps.*reference_free"):
            dpo_loss(*columns[:3], loss_type=kind, **required(kind), **n)

    def test_a_list_with_one_that_needs_it(self) -> None:
        columns, lengths = example(2)
        with pytest.raises(ValueError, match=r"ref_chosen_logps"):
            dpo_loss(*columns[:2], loss_type=["sft", "hinge"], chosen_lengths=lengths[0])

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge", "discopop", "robust", "exo_pair"])
    def test_rewards_are_not_transformed(self, kind: str) -> None:
        columns, lengths = example(4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], **required(kind)}
        for more in ({"f_divergence": "js"}, {"length_normalize": True}, {"margin": torch.ones(4).double()}):
            got = dpo_loss(*(c.requires_grad_() for c in columns), loss_type=kind, beta=0.3, **more, **n)
            torch.testing.assert_close(got.chosen_rewards, 0.3 * (columns[0] - columns[2]).detach())
            torch.testing.assert_close(got.rejected_rewards, 0.3 * (columns[1] - columns[3]).detach())
            assert not got.chosen_rewards.requires_grad
            assert not got.rejected_rewards.requires_grad

    @pytest.mark.parametrize("more", [{}, {"f_divergence": "js"}, {"margin": torch.tensor([0.5, 1, 2, 3]).double()}])
    def test_normalised_sigmoid_is_sigmoid_norm(self, more: dict[str, Any]) -> None:
        columns, lengths = example(4)
        options = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "reduction": "none", **more}
        wanted = dpo_loss(*columns, loss_type="sigmoid_norm", **options)
        assert not torch.equal(wanted.loss, dpo_loss(*columns, **options).loss)
        for a, b in zip(wanted, dpo_loss(*columns, length_normalize=True, **options), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("kind", NORMALIZED)
    def test_normalising_is_implied(self, kind: str) -> None:
        columns, lengths = example(4)
        options = {"loss_type": kind, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        implied, said = dpo_loss(*columns, **options), dpo_loss(*columns, length_normalize=True, **options)
        for a, b in zip(implied, said, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("kind", REFERENCED)
    def test_normalising_is_dividing_what_is_given(self, kind: str) -> None:
        columns, lengths = example(5)
        shared = {"reduction": "none", **required(kind)}
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        got = dpo_loss(*columns, loss_type=kind, length_normalize=True, **n, **shared).loss
        divided = [c / lengths[i % 2] for i, c in enumerate(columns)]
        plain = "sigmoid" if kind == "sigmoid_norm" else kind
        torch.testing.assert_close(got, dpo_loss(*divided, loss_type=plain, **shared).loss, rtol=1e-12, atol=1e-12)

    def test_lengths_of_any_integer_dtype(self) -> None:
        columns, lengths = example(4)
        wanted = dpo_loss(
            *columns, loss_type="ipo", length_normalize=True, chosen_lengths=lengths[0], rejected_lengths=lengths[1]
        ).loss
        narrow = [n.int() for n in lengths]
        got = dpo_loss(
            *columns, loss_type="ipo", length_normalize=True, chosen_lengths=narrow[0], rejected_lengths=narrow[1]
        ).loss
        assert torch.equal(got, wanted)

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize(
        ("kinds", "weights"),
        [
            (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]),
            (["hinge", "ipo"], None),
            (("apo_zero", "aot"), (2.0, -0.5)),
            (["simpo", "orpo"], [1.0, 0.0]),
            (["discopop"], [0.25]),
            (["sigmoid", "sigmoid"], [0.5, 0.25]),
        ],
    )
    def test_lists_are_weighted_sums(self, kinds: Sequence[str], weights: Any, reduction: str) -> None:
        columns, lengths = example(4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "reduction": reduction}
        leaves = [c.requires_grad_() for c in columns]
        got = dpo_loss(*leaves, loss_type=kinds, loss_weights=weights, **n)
        parts = [dpo_loss(*leaves, loss_type=kind, **n).loss for kind in kinds]
        wanted = sum(x * part for x, part in zip(weights or [1.0] * len(kinds), parts, strict=True))
        torch.testing.assert_close(got.loss, wanted, rtol=1e-13, atol=1e-14)
        slopes = [
            torch.autograd.grad(x.sum(), leaves, allow_unused=True, materialize_grads=True) for x in (got.loss, wanted)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)
        against = [0.0 * columns[2], 0.0 * columns[3]] if set(kinds) <= set(FREE) else columns[2:]
        torch.testing.assert_close(got.chosen_rewards, (0.1 * (columns[0] - against[0])).detach())
        torch.testing.assert_close(got.rejected_rewards, (0.1 * (columns[1] - against[1])).detach())

    def test_sft_weight_is_added_to_a_list_once(self) -> None:
        columns, lengths = example(4)
        plain = dpo_loss(*columns, loss_type=["sigmoid", "hinge"], loss_weights=[0.5, 2.0]).loss
        likelihood = dpo_loss(*columns, loss_type="sft", chosen_lengths=lengths[0]).loss
        got = dpo_loss(
            *columns,
            loss_type=["sigmoid", "hinge"],
            loss_weights=[0.5, 2.0],
            sft_weight=0.25,
            chosen_lengths=lengths[0],
        ).loss
        torch.testing.assert_close(got, plain + 0.25 * likelihood, rtol=1e-14, atol=0)


class TestSorted:
    @pytest.mark.parametrize("kind", SORTED)
    def test_mean_of_the_ranks_is_the_mean(self, kind: str) -> None:
        columns, _ = example(6)
        each = dpo_loss(*columns, loss_type=kind, reduction="none").loss
        assert each.shape == (6,)
        assert not torch.allclose(each, dpo_loss(*columns, reduction="none").loss)
        torch.testing.assert_close(dpo_loss(*columns, loss_type=kind).loss, each.mean(), rtol=1e-14, atol=0)

    @pytest.mark.parametrize("kind", SORTED)
    def test_each_sides_order_does_not_count(self, kind: str) -> None:
        (w, l, rw, rl), _ = example(6)  # noqa: E741
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        moved = (w[order], l[order], rw, rl) if kind == "aot" else (w[order], l, rw[order], rl)
        wanted = dpo_loss(w, l, rw, rl, loss_type=kind).loss
        torch.testing.assert_close(dpo_loss(*moved, loss_type=kind).loss, wanted, rtol=1e-14, atol=0)
        plain = dpo_loss(w, l, rw, rl).loss
        assert not torch.allclose(dpo_loss(*moved).loss, plain)

    @pytest.mark.parametrize("kind", SORTED)
    @wide_dtypes
    def test_all_tied(self, kind: str, dtype: torch.dtype) -> None:
        leaves = [torch.full((5,), x, dtype=dtype).requires_grad_() for x in (-3.0, -4.0, -5.0, -6.0)]
        loss = dpo_loss(*leaves, loss_type=kind, beta=1.0).loss
        assert loss.item() == pytest.approx(LOG2, rel=1e-6)
        slopes = torch.autograd.grad(loss, leaves)
        # Whichever comes first, each is matched with one.
        for slope, wanted in zip(slopes, (-0.1, 0.1, 0.1, -0.1), strict=True):
            assert slope.tolist() == pytest.approx([wanted] * 5, rel=1e-6)

    @pytest.mark.parametrize("kind", SORTED)
    def test_one_pair_is_sigmoid(self, kind: str) -> None:
        columns, _ = example(1)
        got = dpo_loss(*columns, loss_type=kind, label_smoothing=0.2).loss
        torch.testing.assert_close(got, dpo_loss(*columns, label_smoothing=0.2).loss, rtol=1e-14, atol=0)


PAIRS = 4
HIDDEN, WEIGHT = torch.randn(2 * PAIRS, 5, 3), torch.randn(7, 3)
LABELS = torch.randint(7, (2 * PAIRS, 5))
REFERENCES = {"ref_chosen_logps": torch.randn(PAIRS), "ref_rejected_logps": torch.randn(PAIRS)}


class TestLossTypes:
    """A mapping of loss types to their weights is taken, and a set is not."""

    WEIGHTED: Mapping[str, float] = MappingProxyType({"sigmoid": 0.5, "hinge": 3.0})

    @staticmethod
    def expected(beta: float, *logps: Tensor) -> float:
        w, l, rw, rl = (tensor.tolist() for tensor in logps)  # noqa: E741
        gaps = [beta * (a - b - (c - d)) for a, b, c, d in zip(w, l, rw, rl, strict=True)]
        losses = [0.5 * math.log1p(math.exp(-gap)) + 3.0 * max(0.0, 1 - gap) for gap in gaps]
        return math.fsum(losses) / len(losses)

    def test_a_mapping_weighs_the_losses(self) -> None:
        logps = tuple(torch.randn(4, PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
        wanted = self.expected(0.2, *logps)
        assert abs(wanted - float(dpo_loss(*logps, beta=0.2, loss_type=["sigmoid", "hinge"]).loss)) > 0.5
        for function in (dpo_loss, reference.dpo_loss):
            got = function(*logps, beta=0.2, loss_type=self.WEIGHTED).loss
            assert float(got) == pytest.approx(wanted, rel=1e-14)
        assert float(nn.DPOLoss(beta=0.2, loss_type=self.WEIGHTED)(*logps).loss) == pytest.approx(wanted, rel=1e-14)

    def test_of_hidden_states(self) -> None:
        hidden, weight = HIDDEN.double(), WEIGHT.double()
        refs = {name: value.double() for name, value in REFERENCES.items()}
        logps = reference.linear_sequence_logprobs(hidden, weight, LABELS).tensor_split(2)
        wanted = self.expected(0.1, *logps, *refs.values())
        for package in (fastpref, reference):
            result = package.linear_dpo_loss(hidden, weight, LABELS, **refs, loss_type=self.WEIGHTED)
            assert float(result.loss) == pytest.approx(wanted, rel=1e-12)

    def test_what_says_the_weights_twice_is_refused(self) -> None:
        x = torch.zeros(2)
        for options in ({"loss_type": self.WEIGHTED}, {"loss_type": {"sigmoid": 1.0}}):
            with pytest.raises(ValueError, match=r"loss_weights must be None where loss_type is a mapping.*\[0\.5, 3"):
                dpo_loss(x, x, x, x, **options, loss_weights=[0.5, 3])

    def test_a_set_is_refused_with_weights_or_without(self) -> None:
        x = torch.zeros(2)
        for weights in (None, [0.5, 3.0]):
            for kinds in ({"sigmoid", "hinge"}, frozenset({"sigmoid", "hinge"})):
                with pytest.raises(TypeError, match=r"loss_type must be a name, a sequence .*set"):
                    dpo_loss(x, x, x, x, loss_type=kinds, loss_weights=weights)  # type: ignore[arg-type]


# A value of every option that some types do not take.
VALUES: dict[str, Any] = {
    "gamma": 1.0,
    "delta": 0.5,
    "discopop_tau": 0.1,
    "margin": torch.ones(2),
    "f_divergence": "js",
    "weights": torch.ones(2),
    "label_smoothing": 0.1,
    "length_normalize": True,
}
REFUSED = [
    (option, kind, {option: value}) for option, value in VALUES.items() for kind in TYPES if kind not in taking(option)
]


class TestRefusals:
    @pytest.mark.parametrize(("option", "kind", "options"), REFUSED, ids=[f"{o}-{k}" for o, k, _ in REFUSED])
    def test_options_without_a_meaning(self, option: str, kind: str, options: dict[str, Any]) -> None:
        x, n = torch.tensor([-1.0, -2.0]), torch.tensor([3, 4])
        more = {**required(kind), **options}
        lengths = {"chosen_lengths": n, "rejected_lengths": n}
        dpo_loss(x, x - 1, x, x, loss_type=kind, **required(kind), **lengths)
        with pytest.raises(ValueError, match=rf"(?s){option}.*\b{kind}\b|\b{kind}\b.*{option}"):
            dpo_loss(x, x - 1, x, x, loss_type=kind, **more, **lengths)

    @pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js"])
    def test_alpha_of_another_divergence(self, name: str) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=rf"(?s)f_alpha.*{name}|{name}.*f_alpha"):
            dpo_loss(x, x, x, x, f_divergence=name, f_alpha=0.25)

    @pytest.mark.parametrize(
        ("kind", "eps"),
        [
            ("robust", 0.5),
            ("robust", 0.75),
            ("robust", 1.0),
            ("exo_pair", 0.0),
            ("exo_pair", 1.0),
        ],
    )
    def test_label_smoothing_out_of_range(self, kind: str, eps: float) -> None:
        x = torch.zeros(2)
        both = rf"(label_smoothing.*{kind}|{kind}.*label_smoothing)"
        with pytest.raises(ValueError, match=rf"(?s){both}.*{re.escape(str(eps))}"):
            dpo_loss(x, x, x, x, loss_type=kind, label_smoothing=eps)

    @pytest.mark.parametrize("kind", NORMALIZED)
    def test_lengths_missing(self, kind: str) -> None:
        x, n = torch.full((2,), -1.0), torch.ones(2, dtype=torch.long)
        with pytest.raises(ValueError, match=rf"(?s){kind}.*chosen_lengths|chosen_lengths.*{kind}"):
            dpo_loss(x, x, x, x, loss_type=kind, rejected_lengths=n)
        with pytest.raises(ValueError, match=rf"(?s){kind}.*rejected_lengths|rejected_lengths.*{kind}"):
            dpo_loss(x, x, x, x, loss_type=kind, chosen_lengths=n)

    @pytest.mark.parametrize(
        "options",
        [{"length_normalize": True}, {"sft_weight": 0.5}, {"loss_type": "sft"}, {"loss_type": ["hinge", "sft"]}],
    )
    def test_lengths_missing_for_an_option(self, options: dict[str, Any]) -> None:
        x = torch.zeros(2)
        name = "length_normalize" if "length_normalize" in options else "sft"
        with pytest.raises(ValueError, match=rf"(?s){name}.*chosen_lengths|chosen_lengths.*{name}"):
            dpo_loss(x, x, x, x, **options)

    @pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], []])
    def test_loss_weights_of_another_number(self, weights: list[float]) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=rf"loss_weights.*2.*{re.escape(str(weights))}"):
            dpo_loss(x, x, x, x, loss_type=["sigmoid", "hinge"], loss_weights=weights)

    def test_loss_weights_of_no_list(self) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match="loss_weights"):
            dpo_loss(x, x, x, x, loss_weights=[0.5, 0.5])
        with pytest.raises(ValueError, match="loss_type"):
            dpo_loss(x, x, x, x, loss_type=[])

    @pytest.mark.parametrize(
        ("options", "listed"),
        [
            ({"loss_type": "dpo"}, TYPES),
            ({"loss_type": ["sigmoid", "dpo"]}, TYPES),
            ({"f_divergence": "dpo"}, ("reverse_kl", "forward_kl", "js", "alpha")),
            (
                {"sft_weight": 1.0, "sft_reduction": "dpo", "chosen_lengths": torch.ones(2).long()},
                ("token", "sequence"),
            ),
        ],
        ids=["loss_type", "loss_type in a list", "f_divergence", "sft_reduction"],
    )
    def test_unknown_names(self, options: dict[str, Any], listed: Sequence[str]) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match="'dpo'") as raised:
            dpo_loss(x, x, x, x, **options)
        for name in listed:
            assert f"'{name}'" in str(raised.value)

    @pytest.mark.parametrize("name", ["margin", "weights", "chosen_lengths", "rejected_lengths"])
    def test_shapes(self, name: str) -> None:
        x, n = torch.zeros(2), torch.ones(2, dtype=torch.long)
        options = {"margin": x, "weights": x, "chosen_lengths": n, "rejected_lengths": n, "length_normalize": True}
        dpo_loss(x, x, x, x, **options)
        with pytest.raises(ValueError, match=rf"{name} must .*2.*3"):
            dpo_loss(x, x, x, x, **{**options, name: torch.ones(3, dtype=options[name].dtype)})

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"beta": 0.0}, r"beta must be .*above 0.*0\.0"),
            ({"beta": math.nan}, r"beta must be .*nan"),
            ({"beta": math.inf}, r"beta must be a finite.*inf"),
            ({"beta": None}, r"beta must be .*None"),
            ({"label_smoothing": -0.1}, r"label_smoothing must be .*\[0, 1\].*-0\.1"),
            ({"label_smoothing": 1.1}, r"label_smoothing must be .*\[0, 1\].*1\.1"),
            ({"label_smoothing": math.nan}, r"label_smoothing must be .*nan"),
            ({"loss_type": "dpo"}, r"loss_type must be .*'sigmoid'.*'dpo'"),
        ],
    )
    def test_dpo_options(self, options: dict[str, Any], words: str) -> None:
        x = torch.zeros(2)
        with pytest.raises((ValueError, TypeError), match=words):
            dpo_loss(x, x, x, x, **options)

    def test_dpo_without_its_reference(self) -> None:
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"'sigmoid' needs ref_chosen_logps.*reference_free"):
            dpo_loss(x, x)
        with pytest.raises(ValueError, match=r"'sigmoid' needs ref_rejected_logps.*reference_free"):
            dpo_loss(x, x, x)


class TestCompile:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    @pytest.mark.parametrize(
        "options",
        [
            {"f_divergence": "js", "margin": torch.ones(5).double(), "label_smoothing": 0.1},
            {"loss_type": "ipo", "length_normalize": True},
            {"loss_type": "aot"},
            {"loss_type": "discopop", "weights": torch.ones(5).double()},
            {"loss_type": ["orpo", "sft"], "loss_weights": [0.5, 1.0]},
        ],
        ids=["sigmoid", "ipo", "aot", "discopop", "list"],
    )
    def test_traces_whole(self, options: dict[str, Any]) -> None:
        torch.compiler.reset()
        columns, lengths = example(5)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        compiled = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")
        answers = []
        for function in (dpo_loss, compiled):
            leaves = [c.clone().requires_grad_() for c in columns[:2]]
            result = function(*leaves, *columns[2:], **n, **options)
            answers.append([*result, *torch.autograd.grad(result.loss, leaves)])
        torch.testing.assert_close(*answers, rtol=1e-13, atol=1e-14)

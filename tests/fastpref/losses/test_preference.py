"""Every `loss_type` of `dpo_loss` against its definition in 50 digits, at points worked out by hand and at extremes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import dpo_loss, implicit_reward, token_logprobs
from tests.helpers.dpo import (
    BUT_SFT,
    FREE,
    LOG2,
    LOG3,
    REFERENCED,
    SORTED,
    TYPES,
    check,
    choices,
    every_type,
    example,
    required,
    taking,
)
from tests.helpers.marks import examples, wide_dtypes
from tests.oracles.precision import numbers
from tests.oracles.preference import dpo_losses

CASES = [
    pytest.param(
        kind,
        options,
        id="-".join([kind, *(f"{k}={'each' if isinstance(v, Tensor) else v}" for k, v in options.items())]),
    )
    for kind in TYPES
    for options in choices(kind)
]


class TestDefinitions:
    @pytest.mark.parametrize(("kind", "options"), CASES)
    @wide_dtypes
    def test_random(self, kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
        columns, lengths = example(5, dtype=dtype)
        options = {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in options.items()}
        # How the likelihood of a batch is shared among its sequences is nobody's business; its mean is.
        check(kind, columns, lengths, "mean" if kind == "sft" else "none", **options)

    @every_type
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_is_computed_in_float32(self, kind: str, dtype: torch.dtype) -> None:
        columns, lengths = example(5, 1, dtype)
        check(kind, columns, lengths, "mean", **required(kind))
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        got = dpo_loss(*columns, loss_type=kind, **required(kind), **n)
        assert {x.dtype for x in got} == {torch.float32}
        wide = dpo_loss(*(c.float() for c in columns), loss_type=kind, **required(kind), **n)
        for a, b in zip(got, wide, strict=True):
            assert torch.equal(a, b)

    @every_type
    @pytest.mark.parametrize("size", [0, 1])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_small_batches(self, kind: str, size: int, reduction: str) -> None:
        columns, lengths = example(size, 2)
        check(kind, columns, lengths, reduction, **required(kind))
        leaves = [c.requires_grad_() for c in columns[:2]]
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        loss = dpo_loss(*leaves, *columns[2:], loss_type=kind, reduction=reduction, **required(kind), **n).loss
        if size == 0:
            assert loss.sum().item() == 0
            for gradient in torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True):
                assert gradient.shape == (0,)

    @every_type
    def test_reductions_agree(self, kind: str) -> None:
        columns, lengths = example(7, 3)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        weight = 0.0 if kind == "sft" else 0.25
        each, total, mean = (
            dpo_loss(*columns, loss_type=kind, reduction=how, sft_weight=weight, **required(kind), **n).loss
            for how in ("none", "sum", "mean")
        )
        assert each.shape == (7,)
        torch.testing.assert_close(total, each.sum(), rtol=1e-14, atol=0)
        torch.testing.assert_close(mean, each.sum() / 7, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("kind", BUT_SFT)
    def test_gradcheck(self, kind: str) -> None:
        columns, lengths = example(4, 4)
        n = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "sft_weight": 0.5, "beta": 0.5}
        leaves = [c.requires_grad_() for c in columns]
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda *x, how=reduction: dpo_loss(*x, loss_type=kind, reduction=how, **required(kind), **n).loss,
                leaves,
            )


ROW = math.log(4 / 3)  # -log sigmoid(log 3)


def point(
    kind: str, ratios: tuple[float, float], wanted: float, beta: float = 1.0, n: tuple[int, int] = (1, 1), **more: Any
) -> Any:
    """Return a case of one pair of log-ratios, or of log-probs without a reference, and its loss worked out by hand."""
    name = ", ".join([kind, str(ratios), *(f"{k}={v}" for k, v in more.items())])
    return pytest.param(kind, ratios, wanted, {"beta": beta, **more}, n, id=name)


BY_HAND = [
    point("sigmoid", (0.0, 0.0), LOG2),
    point("sigmoid", (LOG3, 0.0), ROW),
    point("sigmoid", (0.0, 1.0), -math.log(1 / (math.e + 1))),
    point("sigmoid", (1.0, 0.0), -math.log(math.e / (math.e + 1))),
    point("sigmoid", (0.0, LOG2), -math.log(1 / 3)),
    point("sigmoid", (LOG3, 0.0), 0.75 * ROW + 0.25 * math.log(4), label_smoothing=0.25),
    point("sigmoid", (LOG3, 0.0), LOG2, margin=torch.tensor([LOG3], dtype=torch.float64)),
    # f(-log 2) = 1 - 2; f(log 3) = log 2 + log(3/4); f(log 4) = (1/2 - 1)/(-1/2) and (4 - 1)/1
    point("sigmoid", (0.0, -LOG2), -math.log(math.e / (math.e + 1)), f_divergence="forward_kl"),
    point("sigmoid", (LOG3, 0.0), math.log(5 / 3), f_divergence="js"),
    point("sigmoid", (math.log(4), 0.0), -math.log(math.e / (math.e + 1)), f_divergence="alpha"),
    point("sigmoid", (math.log(4), 0.0), math.log1p(math.exp(-3)), f_divergence="alpha", f_alpha=2.0),
    point("robust", (LOG3, 0.0), (0.75 * ROW - 0.25 * math.log(4)) / 0.5, label_smoothing=0.25),
    point("hinge", (0.25, 0.0), 0.75),
    point("hinge", (2.0, 0.0), 0.0),
    point("hinge", (-3.0, 1.0), 3.0, beta=0.5),
    point("ipo", (3.0, 0.0), 4.0, beta=0.5),
    point("ipo", (6.0, -4.0), 9.0, beta=0.5, n=(2, 4), length_normalize=True),
    point("sigmoid_norm", (2 * LOG3, 0.0), ROW, n=(2, 7)),
    point("exo_pair", (0.0, 0.0), 0.5 * math.log(4 / 3), label_smoothing=0.25),
    point("exo_pair", (LOG3, 0.0), 0.0, label_smoothing=0.25),
    point("nca_pair", (LOG3, 0.0), ROW + 0.5 * math.log(4) + 0.5 * LOG2),
    point("bco_pair", (LOG3, -LOG3), 2 * ROW),
    point("bco_pair", (LOG3, -LOG3), LOG2 + math.log(10 / 9), delta=LOG3),
    point("sppo_hard", (3.0, 1.0), 8.0, beta=0.5),
    point("apo_zero", (LOG3, 0.0), 0.75),
    point("apo_down", (LOG3, 0.0), 1.0),
    point("apo_down", (LOG3, LOG3), 1.25),
    point("discopop", (LOG3, 0.0), 0.25 * ROW + 0.25, discopop_tau=1.0),
    point("discopop", (LOG3, 0.0), 0.1 * ROW + 0.3, discopop_tau=0.5),
    point("discopop", (0.0, 0.0), 0.5 * LOG2 + 0.5),
    point("aot", (LOG3, 0.0), ROW),
    point("aot_unpaired", (LOG3, 0.0), ROW),
    point("simpo", (-2 * LOG2, -math.log(6)), LOG2, n=(2, 1), gamma=LOG3),
    point("simpo", (-2 * LOG2, -math.log(6)), ROW, n=(2, 1), gamma=0.0),
    point("cpo", (-1.0, -1.0 - LOG3), ROW),
    # Odds of 3 and of 1.
    point("orpo", (3 * math.log(0.75), 2 * math.log(0.5)), 0.5 * ROW, beta=0.5, n=(3, 2)),
    point("sft", (-6.0, -1.0), 1.5, n=(4, 1)),
]


class TestByHand:
    @pytest.mark.parametrize(("kind", "ratios", "wanted", "options", "n"), BY_HAND)
    def test_one_pair(
        self, kind: str, ratios: tuple[float, float], wanted: float, options: dict[str, Any], n: tuple[int, int]
    ) -> None:
        reference = (0.0, 0.0) if kind in FREE else (-1.5, -2.25)
        values = (ratios[0] + reference[0], ratios[1] + reference[1], *reference)
        columns = [torch.tensor([x], dtype=torch.float64) for x in values]
        lengths = {"chosen_lengths": torch.tensor([n[0]]), "rejected_lengths": torch.tensor([n[1]])}
        got = dpo_loss(*columns, loss_type=kind, **lengths, **options)
        assert got.loss.item() == pytest.approx(wanted, rel=1e-14, abs=1e-15)
        assert got.chosen_rewards.item() == pytest.approx(options["beta"] * ratios[0], rel=1e-14, abs=1e-15)
        assert got.rejected_rewards.item() == pytest.approx(options["beta"] * ratios[1], rel=1e-14, abs=1e-15)

    def test_defaults(self) -> None:
        x = torch.tensor([10 * LOG3], dtype=torch.float64)
        zero = torch.zeros_like(x)
        assert dpo_loss(x, zero, zero, zero).loss.item() == pytest.approx(ROW)
        assert dpo_loss(x, zero, zero, zero, loss_type="discopop").loss.item() == pytest.approx(
            3**-20 / (1 + 3**-20) * ROW + 1 / (1 + 3**-20) / 3
        )
        one = torch.ones(1, dtype=torch.long)
        simpo = dpo_loss(x - 20, zero - 20, loss_type="simpo", chosen_lengths=one, rejected_lengths=one)
        assert simpo.loss.item() == pytest.approx(math.log1p(math.exp(0.5) / 3))

    def test_sorting_mixes_the_pairs(self) -> None:
        zero = torch.zeros(2, dtype=torch.float64)
        w, rw = torch.tensor([2 * LOG3, LOG3], dtype=torch.float64), torch.tensor([0, LOG3], dtype=torch.float64)
        got = dpo_loss(w, zero, rw, zero, loss_type="aot", beta=1.0, reduction="none")
        assert got.loss.tolist() == pytest.approx([ROW, ROW])
        assert got.chosen_rewards.tolist() == pytest.approx([2 * LOG3, 0.0])
        got = dpo_loss(rw, zero, zero, zero, loss_type="aot_unpaired", beta=1.0, reduction="none")
        assert sorted(got.loss.tolist()) == pytest.approx([ROW, LOG2])


class TestExtremes:
    @pytest.mark.parametrize("kind", REFERENCED)
    @pytest.mark.parametrize("u", [20.0, 100.0, 1e3, 1e4])
    @wide_dtypes
    def test_large_ratios(self, kind: str, u: float, dtype: torch.dtype) -> None:
        ratios = torch.tensor([[u, 0], [-u, 0], [0, u], [0, -u], [u, 3 - u], [-u, u - 3], [u, u - 1]], dtype=dtype)
        policy, reference = ratios.clamp(max=0), -ratios.clamp(min=0)
        columns = [*policy.T, *reference.T]
        lengths = [torch.ones(7, dtype=torch.long)] * 2
        if kind in SORTED:  # without ties, of which each may be the first
            columns = [c - torch.arange(7, dtype=dtype) / n for c, n in zip(columns, (8, 16, 4, 32), strict=True)]
        check(kind, columns, lengths, beta=1.0, **required(kind))

    @pytest.mark.parametrize("kind", ["simpo", "cpo"])
    @pytest.mark.parametrize("u", [100.0, 1e3, 1e4])
    @wide_dtypes
    def test_large_without_a_reference(self, kind: str, u: float, dtype: torch.dtype) -> None:
        w, zero = torch.tensor([-u, 0, -u, -0.5], dtype=dtype), torch.zeros(4, dtype=dtype)
        l = torch.tensor([0, -u, -u, -0.25], dtype=dtype)  # noqa: E741
        check(kind, [w, l, zero, zero], [torch.ones(4).long()] * 2, beta=1.0)

    @pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "cpo", "simpo", "aot", "aot_unpaired"])
    @pytest.mark.parametrize("u", [20.0, 50.0, 85.0])
    def test_tails_keep_their_digits(self, kind: str, u: float) -> None:
        w, zero, one = torch.tensor([u]).requires_grad_(), torch.zeros(1), torch.ones(1, dtype=torch.long)
        options = {"chosen_lengths": one, "rejected_lengths": one, **({"gamma": 0.0} if kind == "simpo" else {})}
        loss = dpo_loss(w, zero, zero, zero, loss_type=kind, beta=1.0, **options).loss
        assert loss.item() == pytest.approx(math.exp(-u), rel=1e-5)
        assert torch.autograd.grad(loss, w)[0].item() == pytest.approx(-math.exp(-u), rel=1e-5)

    @pytest.mark.parametrize("u", [1e1, 88.0, 1e2, 1e3, 1e4])
    @pytest.mark.parametrize("tau", [0.05, 0.5, 1.0, 2.0])
    @wide_dtypes
    def test_discopop(self, u: float, tau: float, dtype: torch.dtype) -> None:
        # Towards -∞ the loss is -u + exp(u/τ - u), out of reach for τ > 1 past here.
        if tau > 1 and u > 150:
            u = 150.0
        w, zero = torch.tensor([u, -u, u / 2, -u / 2], dtype=dtype), torch.zeros(4, dtype=dtype)
        check("discopop", [w, zero, zero, zero], [torch.ones(4).long()] * 2, beta=1.0, discopop_tau=tau)

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge", "exo_pair", "discopop"])
    @wide_dtypes
    @pytest.mark.parametrize(
        ("name", "alpha", "ratios"),
        [
            ("forward_kl", 0.5, [(60.0, -60.0), (0, -85), (85, 0), (1e4, 1e4), (1e4, 0), (0, 1e4)]),
            ("forward_kl", 0.5, [(0.0, -1e3), (0, -1e4), (1e4, -1e4)]),
            ("js", 0.5, [(1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4), (1e4, 1e4), (0, 100), (100, 0)]),
            ("alpha", 0.5, [(60.0, -60.0), (0, -170), (1e4, 1e4), (1e4, 0), (0, 1e4)]),
            ("alpha", 0.5, [(0.0, -1e3), (0, -1e4), (1e4, -1e4)]),
            ("alpha", 2.0, [(60.0, -60.0), (85, 0), (-1e4, -1e4), (0, -1e4)]),
            ("alpha", 2.0, [(1e3, 0.0), (1e4, 0)]),
            ("alpha", 1 + 1e-4, [(1.0, 0.5), (1e-3, 0), (1e4, 0), (0, 1e4)]),
            ("alpha", 1 - 1e-7, [(1.0, 0.5), (1e-3, 0), (-1e-6, 0)]),
        ],
    )
    def test_divergences(
        self, kind: str, name: str, alpha: float, ratios: list[tuple[float, float]], dtype: torch.dtype
    ) -> None:
        """Loss and gradient are right wherever the loss is in float32's range, also where f is not."""
        w, l = torch.tensor(ratios, dtype=dtype).T  # noqa: E741
        zero = torch.zeros_like(w)
        more = {"f_alpha": alpha} if name == "alpha" else {}
        check(kind, [w, l, zero, zero], [torch.ones(len(w)).long()] * 2, f_divergence=name, **more, **required(kind))

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge", "exo_pair", "discopop"])
    @pytest.mark.parametrize(
        ("name", "alpha", "ratios"),
        [
            ("forward_kl", 0.5, [(-100.0, -200.0), (-150, -151), (-95, -1e4)]),
            ("alpha", 0.5, [(-200.0, -400.0), (-300, -302), (-190, -1e4)]),
            ("alpha", 2.0, [(200.0, 100.0), (151, 150), (1e4, 95)]),
        ],
    )
    def test_divergences_beyond_float32_on_both_sides(
        self, kind: str, name: str, alpha: float, ratios: list[tuple[float, float]]
    ) -> None:
        """The loss is right where f of both log-ratios, and their difference, are out of range."""
        w, l = torch.tensor(ratios).T  # noqa: E741
        zero = torch.zeros_like(w)
        more = {"f_alpha": alpha} if name == "alpha" else {}
        check(kind, [w, l, zero, zero], [torch.ones(len(w)).long()] * 2, f_divergence=name, **more, **required(kind))

    @wide_dtypes
    @pytest.mark.parametrize("n", [1, 5])
    def test_orpo_near_certainty(self, dtype: torch.dtype, n: int) -> None:
        small, half = [-1e-9, -1e-30, -1e-9, -1e-30, -0.3, -2.0], [-0.7, -0.7, -1e-9, -1e-9, -1e-30, -1e-9]
        w, l = torch.tensor(small, dtype=dtype) * n, torch.tensor(half, dtype=dtype) * n  # noqa: E741
        zero = torch.zeros(6, dtype=dtype)
        # Log-odds near 70 have ulp of 70, and the slope goes as their exponential.
        check("orpo", [w, l, zero, zero], [torch.full((6,), n)] * 2, ulps=128)

    @wide_dtypes
    def test_orpo_at_certainty(self, dtype: torch.dtype) -> None:
        """Where the chosen p is 1, the loss is 0 and its slope −β·odds(rejected)/n. No value is NaN."""
        w, l = (torch.tensor(x, dtype=dtype).requires_grad_() for x in ([0.0, -0.5, 0.0], [-1.4, 0.0, 0.0]))  # noqa: E741
        n = {"chosen_lengths": torch.tensor([4, 4, 4]), "rejected_lengths": torch.tensor([2, 2, 2])}
        loss = dpo_loss(w, l, loss_type="orpo", beta=0.5, reduction="none", **n).loss
        gradients = torch.autograd.grad(loss.sum(), (w, l))
        assert loss[0].item() == pytest.approx(0, abs=1e-12)
        odds = math.exp(-0.7) / -math.expm1(-0.7)
        assert gradients[0][0].item() == pytest.approx(-0.5 * odds / 4, rel=1e-5)
        assert gradients[1][0].item() == pytest.approx(0, abs=1e-12)
        assert loss[1].item() > 5  # beyond what -1e-9 would cost
        assert not loss.isnan().any()
        assert not any(g.isnan().any() for g in gradients)

    @wide_dtypes
    @pytest.mark.parametrize(
        ("kind", "eps"),
        [
            ("sigmoid", 1e-30),
            ("sigmoid", 0.5),
            ("robust", 1e-30),
            ("robust", 0.49),
            ("robust", 0.49999),
            ("exo_pair", 1e-9),
            ("exo_pair", 1e-300),
            ("exo_pair", 0.5),
            ("exo_pair", 1 - 1e-9),
            ("aot", 0.5),
            ("aot_unpaired", 1e-30),
        ],
    )
    def test_label_smoothing_at_its_limits(self, kind: str, eps: float, dtype: torch.dtype) -> None:
        columns, lengths = example(5, 6, dtype)
        # The terms of robust cancel: its truth is measured by them.
        if kind == "robust" and eps > 0.4:
            columns = [c.double() for c in columns]
        check(kind, columns, lengths, label_smoothing=eps, beta=0.5)

    @every_type
    def test_lengths_of_zero_are_one(self, kind: str) -> None:
        columns, lengths = example(4, 7)
        lengths[0][1] = lengths[1][2] = 0
        if kind != "orpo":  # whose log-odds at no token at all are infinite
            columns[0][1] = columns[1][2] = 0.0
        norm = {"length_normalize": True} if kind in BUT_SFT else {}
        check(kind, columns, lengths, "mean", **norm, **required(kind))
        added = {} if kind == "sft" else {"sft_weight": 0.5, **norm}
        for how in ("token", "sequence"):
            check(kind, columns, lengths, "mean", sft_reduction=how, **added, **required(kind))

    def test_hinge_and_ipo_are_exact(self) -> None:
        w, zero = torch.tensor([1e4, -1e4]), torch.zeros(2)
        assert dpo_loss(w, zero, zero, zero, loss_type="hinge", beta=1.0, reduction="none").loss.tolist() == [0, 10001]
        got = dpo_loss(w, zero, zero, zero, loss_type="ipo", beta=0.5, reduction="none").loss
        assert got.tolist() == pytest.approx([9999.0**2, 10001.0**2], rel=1e-7)


@examples(400)
@given(data=st.data())
def test_anything(data: Any) -> None:
    """The loss is right for any type and batch, with any of the options that the type takes."""
    draw = data.draw
    kind = draw(st.sampled_from(TYPES))
    size = draw(st.integers(0, 6))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    columns, lengths = example(size, draw(st.integers(0, 2**16)), dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        gone = torch.rand(size, generator=generator) < 0.3
        lengths[0][gone] = 0
    options: dict[str, Any] = {"beta": draw(st.sampled_from([0.01, 0.1, 1.0, 2.5])), **required(kind)}
    if kind in taking("label_smoothing") and draw(st.booleans()):
        options["label_smoothing"] = draw(st.floats(0.01, 0.45))
    if kind in taking("margin") and draw(st.booleans()):
        options["margin"] = torch.randn(size, generator=generator)
    if kind in taking("weights") and draw(st.booleans()):
        options["weights"] = torch.rand(size, generator=generator)
    if kind in taking("f_divergence") and draw(st.booleans()):
        options["f_divergence"] = draw(st.sampled_from(["forward_kl", "js", "alpha"]))
        if options["f_divergence"] == "alpha":
            options["f_alpha"] = draw(st.sampled_from([-1.0, 0.5, 0.999, 1.0, 1.5]))
    if kind in BUT_SFT and draw(st.booleans()):
        options["length_normalize"] = True
    if kind not in FREE and draw(st.booleans()):
        options["reference_free"] = True
        options.pop("f_divergence", None)  # of sums of log-probs themselves, which are far from 0
        options.pop("f_alpha", None)
    if kind != "sft" and draw(st.booleans()):
        options["sft_weight"] = draw(st.sampled_from([0.1, 2.0]))
        options["sft_reduction"] = draw(st.sampled_from(["token", "sequence"]))
    likelihood = kind == "sft" or "sft_weight" in options
    reduction = draw(st.sampled_from(["mean", "sum"] if likelihood else ["mean", "sum", "none"]))
    if reduction == "sum":
        reduction = "mean"
        check(kind, columns, lengths, "mean", gradient=False, **options)
    check(kind, columns, lengths, reduction, gradient=kind not in SORTED, **options)


class TestDpo:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
    def test_formula(self, beta: float, smoothing: float) -> None:
        w, l, rw, rl = (torch.randn(6, dtype=torch.float64) * 20 for _ in range(4))  # noqa: E741
        result = dpo_loss(w, l, rw, rl, beta=beta, label_smoothing=smoothing, reduction="none")
        columns = [numbers(x) for x in (w, l, rw, rl)]
        wanted = dpo_losses("sigmoid", columns, [[1] * 6] * 2, beta=beta, label_smoothing=smoothing)
        for i in range(6):
            assert result.loss[i].item() == pytest.approx(float(wanted[i]), rel=1e-12)
        torch.testing.assert_close(result.chosen_rewards, beta * (w - rw))
        torch.testing.assert_close(result.rejected_rewards, beta * (l - rl))

    @pytest.mark.parametrize("u", [1e2, 1e3, 1e4])
    def test_extremes(self, u: float) -> None:
        chosen = torch.tensor([u, -u]).requires_grad_()
        zero = torch.zeros(2)
        loss = dpo_loss(chosen, zero, zero, zero, beta=1.0, reduction="none").loss
        assert loss[0].item() == pytest.approx(math.exp(-u), rel=1e-5)
        assert loss[1].item() == pytest.approx(u, rel=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert gradient[0].item() == pytest.approx(-math.exp(-u), rel=1e-5)
        assert gradient[1].item() == -1

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_rewards_are_detached_and_per_pair(self, reduction: str) -> None:
        w, l = torch.randn(5).requires_grad_(), torch.randn(5).requires_grad_()  # noqa: E741
        result = dpo_loss(w, l, torch.randn(5), torch.randn(5), reduction=reduction)
        assert result.loss.requires_grad
        for value in (result.chosen_rewards, result.rejected_rewards, result.margins, result.accuracies):
            assert value.shape == (5,)
            assert not value.requires_grad

    def test_gradient_reaches_the_reference_too(self) -> None:
        values = [torch.randn(3, dtype=torch.float64).requires_grad_() for _ in range(4)]
        gradients = torch.autograd.grad(dpo_loss(*values).loss, values)
        torch.testing.assert_close(gradients[0], -gradients[2])
        torch.testing.assert_close(gradients[1], -gradients[3])
        torch.testing.assert_close(gradients[0], -gradients[1])

    def test_reference_free_is_a_reference_of_zeros(self) -> None:
        w, l, zero = torch.randn(5), torch.randn(5), torch.zeros(5)  # noqa: E741
        for wanted, got in zip(dpo_loss(w, l, zero, zero), dpo_loss(w, l, reference_free=True), strict=True):
            assert torch.equal(wanted, got)

    def test_float32_policy_and_bfloat16_reference(self) -> None:
        w, l = torch.randn(5), torch.randn(5)  # noqa: E741
        ref = torch.randn(5).bfloat16()
        assert torch.equal(dpo_loss(w, l, ref, ref).loss, dpo_loss(w, l, ref.float(), ref.float()).loss)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_gradient_descent_on_dpo_reaches_the_tilted_reference(beta: float) -> None:
    """With answers labelled by Bradley–Terry on r, descent ends at π* = π_ref·exp(r/β)/Z (arXiv 2305.18290, eq. 4)."""
    torch.set_num_threads(1)  # PyTorch splits even a logsigmoid of 36 numbers, and waits for the other thread
    answers = 6
    reward = torch.randn(answers, dtype=torch.float64)
    ref = torch.randn(answers, dtype=torch.float64).log_softmax(0)

    def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
        """Return every (chosen, rejected) in one order. A pair of an answer with itself has no gradient."""
        return values[:, None].expand(answers, answers).flatten(), values.expand(answers, answers).flatten()

    chosen, rejected = pairs(reward)
    preferred = torch.sigmoid(chosen - rejected)  # P(chosen ≻ rejected)
    every = torch.arange(answers)

    policy = ref.clone().requires_grad_()  # training starts at the reference
    for _ in range(1500):
        logps = token_logprobs(policy.expand(answers, answers), every, shift=False)
        losses = dpo_loss(*pairs(logps), *pairs(ref), beta=beta, reduction="none").loss
        (gradient,) = torch.autograd.grad((preferred * losses).mean(), policy)
        with torch.no_grad():
            policy -= 10 / beta**2 * gradient

    optimum = (ref + reward / beta).log_softmax(0)
    reached = policy.detach().log_softmax(0)
    assert (optimum.exp() - ref.exp()).abs().max() > 0.05
    torch.testing.assert_close(reached.exp(), optimum.exp(), rtol=0, atol=1e-9)
    # And the reward that the policy implies is r, up to one constant.
    implied = implicit_reward(reached, ref, beta=beta) - reward
    torch.testing.assert_close(implied, implied[:1].expand(answers), rtol=0, atol=1e-8)

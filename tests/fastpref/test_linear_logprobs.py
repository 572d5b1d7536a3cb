"""Log-probs from hidden states: values, statistics and all three gradients against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import reference
from tests.helpers.linear_logprobs import (
    MODES,
    NAMES,
    Operands,
    assert_matches_reference,
    make,
    modes,
    run,
    skip_unless_it_may_be_kept,
)
from tests.helpers.marks import both, dtypes, narrow
from tests.tolerance import ALL_STATS, assert_accurate


def test_reference_is_the_log_probs_of_the_product() -> None:
    operands, labels = make((3, 6), 17, dtype=torch.float64)
    z = operands["hidden"] @ operands["weight"].T + operands["bias"]
    for options in ({}, {"softcap": 2.0, "temperature": 0.7, "shift": False}):
        for name in NAMES:
            found = getattr(reference, name)(
                operands["hidden"], operands["weight"], labels, operands["bias"], stats=ALL_STATS, **options
            )
            wanted = getattr(reference, name.removeprefix("linear_"))(z, labels, stats=ALL_STATS, **options)
            logps, wanted_logps = found.logprobs, wanted.logprobs
            torch.testing.assert_close(logps, wanted_logps, rtol=1e-13, atol=1e-13)
            scored = wanted.lse != 0
            assert scored.any()
            for ours, right in zip(found[1:], wanted[1:], strict=True):
                torch.testing.assert_close(ours, right, rtol=1e-13, atol=1e-13)


class TestAgainstTheDefinition:
    @both
    @dtypes
    @modes
    def test_modes(self, mode: str, dtype: torch.dtype) -> None:
        skip_unless_it_may_be_kept(mode, dtype)
        operands, labels = make((3, 7), 131, dtype=dtype)
        assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode)

    @dtypes
    @pytest.mark.parametrize("vocabulary", [1, 2, 31, 127, 1023])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_vocabulary(self, bias: bool, vocabulary: int, dtype: torch.dtype) -> None:
        operands, labels = make((3, 7), vocabulary, dtype=dtype, bias=bias)
        assert_matches_reference("linear_token_logprobs", operands, labels, stats=ALL_STATS)

    @both
    @narrow
    @pytest.mark.parametrize("mode", ["save", "recompute"])
    @pytest.mark.parametrize("vocabulary", [8193, 50257])
    def test_several_chunks_of_columns(self, vocabulary: int, mode: str, dtype: torch.dtype) -> None:
        # Rows and features enough for eager's largest error to be a typical one.
        operands, _ = make((4, 8), vocabulary, 16, dtype=dtype)
        # Around the borders of chunks of any power of two up to 8192, and at both ends.
        labels = torch.tensor([[0, 1023, 1024, 8191, 8192, vocabulary - 2, vocabulary - 1, 4096]])
        labels = labels.expand(4, -1)
        assert_matches_reference("linear_token_logprobs", operands, labels, shift=False, mode=mode)

    @both
    @narrow
    @pytest.mark.parametrize("chunk_rows", [1, 3, 7, 1000])
    @modes
    def test_chunks_of_rows(self, mode: str, chunk_rows: int, dtype: torch.dtype) -> None:
        operands, labels = make((3, 6), 61, dtype=dtype)
        options = {"mode": mode, "chunk_rows": chunk_rows}
        assert_matches_reference("linear_token_logprobs", operands, labels, stats=("entropy",), **options)
        assert_matches_reference("linear_sequence_logprobs", operands, labels, **options)

    @both
    @pytest.mark.parametrize("features", [1, 2, 17, 64])
    @modes
    def test_features(self, mode: str, features: int) -> None:
        operands, labels = make((2, 5), 37, features)
        assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode)

    @both
    @narrow
    @modes
    @pytest.mark.parametrize("shift", [True, False])
    def test_one_row(self, shift: bool, mode: str, dtype: torch.dtype) -> None:
        operands, labels = make((1, 2) if shift else (1, 1), 53, dtype=dtype)
        labels[:] = 52
        found = assert_matches_reference("linear_token_logprobs", operands, labels, shift=shift, mode=mode)
        assert found["logprobs"].shape == (1, 1)

    @both
    @narrow
    @modes
    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 0.7},
            {"logit_scale": 0.3},
            {"softcap": 5.0},
            {"temperature": 1.3, "logit_scale": 0.6, "softcap": 4.0},
        ],
        ids=["temperature", "logit_scale", "softcap", "all"],
    )
    def test_transform(self, options: dict[str, float], mode: str, dtype: torch.dtype) -> None:
        operands, labels = make((3, 7), 149, dtype=dtype)
        assert_matches_reference("linear_token_logprobs", operands, labels, stats=ALL_STATS, mode=mode, **options)
        assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode, **options)

    @both
    @dtypes
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("shift", [True, False])
    def test_sequences(self, shift: bool, reduction: str, dtype: torch.dtype) -> None:
        operands, labels = make((3, 9), 53, dtype=dtype)
        labels[1] = -100
        options = {"shift": shift, "reduction": reduction}
        assert_matches_reference("linear_sequence_logprobs", operands, labels, stats=ALL_STATS, **options)
        for mode in MODES if dtype != torch.float16 else ("recompute",):
            assert_matches_reference("linear_sequence_logprobs", operands, labels, mode=mode, **options)

    @both
    @narrow
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("shift", [True, False])
    def test_packed(self, shift: bool, reduction: str, dtype: torch.dtype) -> None:
        operands, labels = make((13,), 29, dtype=dtype)
        bounds = torch.tensor([0, 0, 4, 5, 5, 11, 13, 13])
        options = {"cu_seqlens": bounds, "shift": shift, "reduction": reduction}
        found = assert_matches_reference("linear_sequence_logprobs", operands, labels, stats=ALL_STATS, **options)
        assert found["logprobs"].shape == (7,)
        assert found["entropy"].shape == (13 - shift,)
        for rows, y in (((1, 13), labels), ((1, 13), labels[None])):
            again = {**operands, "hidden": operands["hidden"].view(*rows, -1)}
            got = run(fastpref.linear_sequence_logprobs, again, y, stats=("lse",), **options)
            assert torch.equal(got["logprobs"], found["logprobs"])
            assert got["lse"].shape == (*y.shape[:-1], 13 - shift)

    @both
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("packed", [False, True])
    @modes
    def test_length_desensitised(self, mode: str, packed: bool, reduction: str) -> None:
        operands, labels = make((4, 9), 29)
        labels[0, 2:] = labels[3, 4:] = -100
        options: dict[str, Any] = {"ld_alpha": 0.25, "reduction": reduction, "mode": mode}
        if packed:
            options["cu_seqlens"] = torch.tensor([0, 9, 18, 27, 36])
            operands["hidden"], labels = operands["hidden"].flatten(0, 1), labels.flatten()
        assert_matches_reference("linear_sequence_logprobs", operands, labels, **options)
        lengths = torch.tensor([0, 2, 100, 1])
        assert_matches_reference("linear_sequence_logprobs", operands, labels, shared_lengths=lengths, **options)

    @both
    @pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5])
    def test_ignore_index(self, ignore_index: int) -> None:
        operands, labels = make((2, 6), 17)
        labels[labels == -100] = ignore_index
        options = {"ignore_index": ignore_index, "stats": (*ALL_STATS, "dropped_mass")}
        found = assert_matches_reference("linear_token_logprobs", operands, labels, **options)
        ignored = labels[:, 1:] == ignore_index
        assert ignored.any()
        for name in ("logprobs", *ALL_STATS, "dropped_mass"):
            assert not found[name][ignored].any(), name

    @both
    def test_int32_and_strided_labels(self) -> None:
        operands, labels = make((3, 6), 17)
        wanted = run(fastpref.linear_token_logprobs, operands, labels)
        for other in (labels.int(), labels.T.contiguous().T, labels.repeat_interleave(2, 1)[:, ::2]):
            for name, value in run(fastpref.linear_token_logprobs, operands, other).items():
                assert torch.equal(value, wanted[name]), name

    def test_two_dimensional_hidden_states_are_one_sequence(self) -> None:
        operands, labels = make((6,), 17)
        assert assert_matches_reference("linear_token_logprobs", operands, labels)["logprobs"].shape == (5,)
        assert assert_matches_reference("linear_sequence_logprobs", operands, labels)["logprobs"].shape == (1,)

    @both
    @pytest.mark.parametrize("mode", ["save", "recompute"])
    def test_gradcheck(self, mode: str) -> None:
        operands, labels = make((2, 4), 7, 3, torch.float64)

        def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            result = fastpref.linear_token_logprobs(
                hidden, weight, labels, bias, mode=mode, softcap=4.0, stats=("entropy",)
            )
            return result.logprobs, result.entropy

        assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in operands.values()])


@both
class TestStatistics:
    @pytest.mark.parametrize("stat", [*ALL_STATS, "dropped_mass"])
    @modes
    def test_one_alone(self, mode: str, stat: str) -> None:
        operands, labels = make((2, 5), 131)
        found = assert_matches_reference("linear_token_logprobs", operands, labels, stats=(stat,), mode=mode)
        assert list(found)[:2] == ["logprobs", stat]

    def test_come_in_the_order_asked_for(self) -> None:
        operands, labels = make((2, 5), 31)
        stats = ("is_top1", "dropped_mass", "entropy", "lse")
        result = fastpref.linear_token_logprobs(operands["hidden"], operands["weight"], labels, stats=stats)
        assert result._fields == ("logprobs", *stats)
        assert result.is_top1.dtype == torch.bool
        assert not result.dropped_mass.any()

    def test_carry_no_gradient_but_entropy(self) -> None:
        operands, labels = make((2, 5), 31)
        for name in NAMES:
            result = getattr(fastpref, name)(
                operands["hidden"].requires_grad_(), operands["weight"], labels, stats=(*ALL_STATS, "dropped_mass")
            )
            assert {field for field, value in result._asdict().items() if value.requires_grad} == {
                "logprobs",
                "entropy",
            }

    @pytest.mark.parametrize("of", ["entropy", "logprobs"])
    @modes
    def test_either_gradient_alone(self, mode: str, of: str) -> None:
        operands, labels = make((2, 5), 131)

        def gradients(package: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
            leaves = [value.to(dtype, copy=True).requires_grad_() for value in operands.values()]
            hidden, weight, bias = leaves
            result = package.linear_token_logprobs(hidden, weight, labels, bias, mode=mode, stats=("entropy",))
            return torch.autograd.grad(getattr(result, of).sum(), leaves)

        eager, truth = gradients(reference, torch.float32), gradients(reference, torch.float64)
        for ours, peer, right in zip(gradients(fastpref, torch.float32), eager, truth, strict=True):
            assert_accurate(ours, peer, right, summed=10.0)  # of terms p(log p + entropy)·W, which cancel

    @pytest.mark.parametrize("filter_eps", [1e-12, 1e-4, 0.5])
    def test_dropped_mass_bounds_the_gradients_error(self, filter_eps: float) -> None:
        operands, labels = make((2, 6), 9001)
        operands["weight"] *= 4
        exact = run(fastpref.linear_token_logprobs, operands, labels, mode="recompute")
        options = {"mode": "recompute", "filter_eps": filter_eps, "stats": ("dropped_mass",)}
        found = run(fastpref.linear_token_logprobs, operands, labels, **options)
        torch.testing.assert_close(found["logprobs"], exact["logprobs"], rtol=1e-6, atol=1e-6)
        dropped = found["dropped_mass"]
        assert ((dropped >= 0) & (dropped <= 1)).all()
        # ∂logp/∂hidden is W_y − Σ p_j W_j: leaving mass out moves it by that mass times a row of W at the most.
        incoming = torch.randn(dropped.shape, generator=torch.Generator().manual_seed(7)).abs()
        error = (found["dhidden"] - exact["dhidden"]).abs().amax(-1)[:, :-1]
        assert (error <= incoming * dropped * operands["weight"].abs().max() * 1.001 + 1e-5).all()


@both
class TestDigits:
    """Rows whose exponentials leave float32's range, or whose log-prob is near 0."""

    @staticmethod
    def rows(vocabulary: int, columns: list[tuple[dict[int, float], float]], dtype: torch.dtype) -> Operands:
        """Return operands whose row n has the logits of columns[n]: some given by index, the others near one level."""
        generator = torch.Generator().manual_seed(1)
        weight = torch.empty(vocabulary, len(columns))
        for n, (given, level) in enumerate(columns):
            weight[:, n] = level + 0.5 * torch.rand(vocabulary, generator=generator)
            for index, value in given.items():
                weight[index, n] = value
        return {"hidden": torch.eye(len(columns)).to(dtype)[None], "weight": weight.to(dtype)}

    @dtypes
    @modes
    @pytest.mark.parametrize("gap", [60, 89, 115, 130, 200])
    def test_gap_between_the_top_logit_and_the_label(self, gap: int, mode: str, dtype: torch.dtype) -> None:
        skip_unless_it_may_be_kept(mode, dtype)
        labels = torch.tensor([[0, 5, 330, 100, 7]])
        columns = [({int(y): 0.0, (int(y) + 40) % 331: float(gap)}, -1.0) for y in labels[0, :4]]
        operands = self.rows(331, [*columns, ({7: 1.0}, 0.0)], dtype)
        found = assert_matches_reference("linear_token_logprobs", operands, labels, shift=False, mode=mode)
        assert (found["logprobs"][0, :4] <= -0.99 * gap).all()
        stats = ("lse", "entropy", "is_top1", "log_sum_sq_probs")
        assert_matches_reference("linear_token_logprobs", operands, labels, shift=False, mode=mode, stats=stats)

    @narrow
    @modes
    def test_many_tops_far_above_the_label(self, mode: str, dtype: torch.dtype) -> None:
        labels = torch.tensor([[3, 3, 3]])
        operands = self.rows(9001, [({3: 0.0}, level) for level in (70.0, 80.0, 110.0)], dtype)
        assert_matches_reference("linear_token_logprobs", operands, labels, shift=False, mode=mode)

    @modes
    @pytest.mark.parametrize("vocabulary", [2, 3, 1000, 9001])
    @pytest.mark.parametrize("rest", [1e-5, 1e-7])
    def test_logp_near_zero_keeps_its_digits(self, rest: float, vocabulary: int, mode: str) -> None:
        label = vocabulary // 2
        weight = torch.full((vocabulary, 1), 8.0 + math.log(rest / (vocabulary - 1)))
        weight[label] = 8.0
        operands, labels = {"hidden": torch.ones(1, 1, 1), "weight": weight}, torch.tensor([[label]])
        found = assert_matches_reference("linear_token_logprobs", operands, labels, shift=False, mode=mode)
        truth = reference.linear_token_logprobs(torch.ones(1, 1, 1).double(), weight.double(), labels, shift=False)
        assert abs(found["logprobs"].item() / truth.item() - 1) < 1e-4

    @dtypes
    @modes
    def test_flat_rows(self, mode: str, dtype: torch.dtype) -> None:
        skip_unless_it_may_be_kept(mode, dtype)
        operands, labels = make((2, 5), 1031, dtype=dtype, bias=False)
        operands["weight"].zero_()
        found = assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode, stats=("entropy",))
        scored = labels[:, 1:] != -100
        torch.testing.assert_close(found["entropy"][scored], -found["logprobs"][scored], rtol=1e-6, atol=1e-6)

    @dtypes
    @modes
    def test_logp_is_never_above_zero(self, mode: str, dtype: torch.dtype) -> None:
        skip_unless_it_may_be_kept(mode, dtype)
        for lead in (0.0, 1e-3, 9.0, 16.7, 40.0, 200.0):
            operands = self.rows(67, [({n: 0.5 + lead}, 0.0) for n in range(5)], dtype)
            found = fastpref.linear_token_logprobs(
                operands["hidden"], operands["weight"], torch.arange(5)[None], shift=False, mode=mode
            )
            assert (found <= 0).all()

    def test_fp16_has_not_the_range_to_be_kept(self) -> None:
        operands, labels = make((2, 4), 31, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"mode=.save.*float16.*recompute"):
            run(fastpref.linear_token_logprobs, operands, labels, mode="save")

    @dtypes
    def test_outputs_are_never_narrower_than_float32(self, dtype: torch.dtype) -> None:
        operands, labels = make((2, 4), 31, dtype=dtype)
        result = run(fastpref.linear_token_logprobs, operands, labels, stats=(*ALL_STATS, "dropped_mass"))
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        for name, value in result.items():
            if name != "is_top1":
                assert value.dtype == (dtype if name in ("dhidden", "dweight", "dbias") else wanted), name

"""Log-probs from hidden states: masked, NaN and infinite rows, wrong labels, and arguments that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastpref
from fastpref import reference
from fastpref_kernels.contract import COLUMNS
from tests.helpers.linear_logprobs import NAMES, assert_matches_reference, make, modes, run
from tests.helpers.marks import both, narrow, packages
from tests.tolerance import ALL_STATS


@both
@modes
class TestEdges:
    @pytest.mark.parametrize("name", NAMES)
    def test_everything_masked_is_a_differentiable_zero(self, name: str, mode: str) -> None:
        operands, labels = make((2, 5), 37)
        operands["hidden"].fill_(math.nan)
        found = run(getattr(fastpref, name), operands, torch.full_like(labels, -100), mode=mode, stats=("entropy",))
        for value in found.values():
            assert (value == 0).all()

    def test_one_sequence_masked(self, mode: str) -> None:
        operands, labels = make((3, 5), 37)
        labels[1] = -100
        operands["hidden"][1] = math.nan
        for reduction in ("sum", "mean"):
            found = run(fastpref.linear_sequence_logprobs, operands, labels, mode=mode, reduction=reduction)
            assert found["logprobs"][1] == 0
            assert (found["dhidden"][1] == 0).all()
            assert all(value.isfinite().all() for value in found.values())

    @narrow
    def test_nan_in_a_row_that_is_not_scored_has_no_effect(self, dtype: torch.dtype, mode: str) -> None:
        operands, labels = make((3, 6), 37, dtype=dtype)
        labels[:, 1:3] = -100
        wanted = run(fastpref.linear_token_logprobs, operands, labels, mode=mode, stats=ALL_STATS)
        operands["hidden"][:, :2] = math.nan
        operands["hidden"][:, -1] = math.inf
        found = run(fastpref.linear_token_logprobs, operands, labels, mode=mode, stats=ALL_STATS)
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), name
        assert (found["dhidden"][:, [0, 1, -1]] == 0).all()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_in_a_scored_row_harms_its_sequence_alone(self, value: float, mode: str) -> None:
        operands, labels = make((3, 6), 37)
        labels[1, 3] = 5
        clean = run(fastpref.linear_sequence_logprobs, operands, labels, mode=mode)
        operands["hidden"][1, 2, 4] = value
        found = run(fastpref.linear_sequence_logprobs, operands, labels, mode=mode)
        assert found["logprobs"][1].isnan()
        for name in ("logprobs", "dhidden"):
            torch.testing.assert_close(found[name][[0, 2]], clean[name][[0, 2]], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("level", [-200.0, 0.0, 200.0])
    def test_label_and_first_tile_minus_infinity(self, level: float, mode: str) -> None:
        operands, _ = make((1, 3), 2 * COLUMNS + 9)
        operands["bias"] += level
        operands["bias"][:COLUMNS] = -math.inf
        labels = torch.tensor([[5, 2 * COLUMNS + 1, COLUMNS + 2]])  # and −inf at the first alone
        found = assert_matches_reference(
            "linear_token_logprobs", operands, labels, shift=False, mode=mode, stats=ALL_STATS
        )
        assert found["logprobs"].isfinite().tolist() == [[False, True, True]]
        again = run(fastpref.linear_token_logprobs, operands, labels, shift=False, mode=mode, filter_eps=1e-4)
        for value in (*found.values(), *again.values()):
            assert not value.isnan().any()

    def test_everything_minus_infinity(self, mode: str) -> None:
        operands, labels = make((2, 3), 37)
        operands["bias"][:] = -math.inf
        labels[:] = 5
        found, truth = (
            run(package.linear_token_logprobs, operands, labels, mode=mode, stats=ALL_STATS)
            for package in (fastpref, reference)
        )
        for name in ("logprobs", "lse", "mean_logits", "log_sum_sq_probs"):
            torch.testing.assert_close(found[name], truth[name], equal_nan=True)

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_label_of_a_token_of_weight_zero_minus_infinity(self, reduction: str, mode: str) -> None:
        operands, labels = make((2, 6), 37)
        operands["bias"][3] = -math.inf
        labels[:], labels[0, 5], labels[1, 4:] = 7, 3, -100
        options = {"mode": mode, "reduction": reduction, "ld_alpha": 0.0}
        found = assert_matches_reference("linear_sequence_logprobs", operands, labels, **options)
        for value in found.values():
            assert value.isfinite().all()
        assert not found["dhidden"][0, 3:].any()

    def test_incoming_nan_of_an_ignored_token_goes_nowhere(self, mode: str) -> None:
        operands, labels = make((2, 6), 37)
        leaves = [value.requires_grad_() for value in operands.values()]
        incoming = torch.ones(2, 5).masked_fill(labels[:, 1:] == -100, math.nan)
        assert incoming.isnan().any()
        fastpref.linear_token_logprobs(*leaves[:2], labels, leaves[2], mode=mode).backward(incoming)
        for leaf in leaves:
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()

    @pytest.mark.parametrize("bad", [37, -1, -101, 2**31 + 5, -(2**40)])
    def test_label_out_of_range_is_named(self, bad: int, mode: str) -> None:
        operands, labels = make((3, 6), 37)
        labels[0, 1:4] = -100
        labels[2, 4] = bad
        for name in NAMES:
            for shift, position in ((True, 3), (False, 4)):
                with pytest.raises(IndexError, match=rf"{bad}\b.*\[2, {position}\].*\[0, 37\)"):
                    getattr(fastpref, name)(operands["hidden"], operands["weight"], labels, mode=mode, shift=shift)

    def test_label_that_the_shift_discards_is_never_checked(self, mode: str) -> None:
        operands, labels = make((3, 6), 37)
        wanted = run(fastpref.linear_token_logprobs, operands, labels, mode=mode)
        labels[:, 0] = 10**9
        for name, value in run(fastpref.linear_token_logprobs, operands, labels, mode=mode).items():
            assert torch.equal(value, wanted[name]), name
        packed = {**operands, "hidden": operands["hidden"].flatten(0, 1)}
        bounds = torch.tensor([0, 6, 12, 18])
        got = run(fastpref.linear_sequence_logprobs, packed, labels.flatten(), mode=mode, cu_seqlens=bounds)
        sums = run(fastpref.linear_sequence_logprobs, operands, labels, mode=mode)
        torch.testing.assert_close(got["logprobs"], sums["logprobs"])

    def test_nothing_to_score(self, mode: str) -> None:
        for rows in ((0, 5), (0, 1), (0, 0), (3, 0), (3, 1)):
            operands, labels = make(rows, 7) if all(rows) else (make((1, 1), 7)[0], torch.empty(rows, dtype=torch.long))
            operands["hidden"] = torch.zeros(*rows, 9)
            found = run(fastpref.linear_token_logprobs, operands, labels, mode=mode, stats=("entropy",))
            assert found["logprobs"].shape == (rows[0], max(rows[1] - 1, 0))
            assert found["dhidden"].shape == (*rows, 9)
            assert not found["dweight"].any()
            assert not found["dbias"].any()
            sums = run(fastpref.linear_sequence_logprobs, operands, labels, mode=mode, reduction="mean")
            assert sums["logprobs"].tolist() == [0] * rows[0]

    def test_one_entry_in_the_vocabulary(self, mode: str) -> None:
        operands, labels = make((2, 5), 1)
        found = run(fastpref.linear_token_logprobs, operands, labels, mode=mode, stats=("entropy",))
        for name in ("logprobs", "entropy", "dhidden", "dweight", "dbias"):
            assert (found[name] == 0).all(), name


HIDDEN, WEIGHT, BIAS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)
LABELS, PACKED = torch.zeros(2, 3, dtype=torch.long), torch.zeros(6, 4)
# What is wrong: the arguments that differ from a good call of `linear_token_logprobs` (`linear_sequence_logprobs` where
# it alone takes one of them), the error, and what its text must hold: the argument, given and wanted.
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "hidden of integers": ({"hidden": HIDDEN.long()}, TypeError, ("hidden", "torch.int64", "fp32")),
    "hidden no tensor": ({"hidden": [[1.0]]}, TypeError, ("hidden", "list", "tensor")),
    "hidden of one dimension": ({"hidden": HIDDEN[0, 0]}, ValueError, ("hidden", "(4,)", "(B, T, H)")),
    "hidden of four": ({"hidden": HIDDEN[None]}, ValueError, ("hidden", "(1, 2, 3, 4)", "(B, T, H)")),
    "H = 0": ({"hidden": HIDDEN[..., :0], "weight": WEIGHT[:, :0]}, ValueError, ("hidden", "(2, 3, 0)", "H > 0")),
    "weight of integers": ({"weight": WEIGHT.long()}, TypeError, ("weight", "torch.int64", "hidden's dtype")),
    "weight transposed": ({"weight": WEIGHT.T}, ValueError, ("weight", "(4, 5)", "(V, H)", "4")),
    "weight of one dimension": ({"weight": WEIGHT[0]}, ValueError, ("weight", "(4,)", "(V, H)")),
    "V = 0": ({"weight": WEIGHT[:0]}, ValueError, ("weight", "(0, 4)", "V > 0")),
    "weight of another dtype": ({"weight": WEIGHT.half()}, TypeError, ("weight", "torch.float16", "torch.float32")),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, ValueError, ("weight", "meta", "cpu")),
    "bias of integers": ({"bias": BIAS.long()}, TypeError, ("bias", "torch.int64", "hidden's dtype")),
    "bias of another dtype": ({"bias": BIAS.double()}, TypeError, ("bias", "torch.float64", "torch.float32")),
    "bias of another length": ({"bias": BIAS[:4]}, ValueError, ("bias", "(4,)", "(V,)", "5")),
    "bias elsewhere": ({"bias": BIAS.to("meta")}, ValueError, ("bias", "meta", "cpu")),
    "labels of floats": ({"labels": LABELS.float()}, TypeError, ("labels", "torch.float32", "int64")),
    "labels shifted already": ({"labels": LABELS[:, 1:]}, ValueError, ("labels", "(2, 2)", "(2, 3)")),
    "labels flattened": ({"labels": LABELS.view(-1)}, ValueError, ("labels", "(6,)", "(2, 3)")),
    "labels elsewhere": ({"labels": LABELS.to("meta")}, ValueError, ("labels", "meta", "cpu")),
    "mode unknown": ({"mode": "fast"}, ValueError, ("mode", "'fast'", "'recompute'")),
    "chunk_rows 0": ({"chunk_rows": 0}, ValueError, ("chunk_rows", "0", "1 or more")),
    "chunk_rows a float": ({"chunk_rows": 2.5}, TypeError, ("chunk_rows", "2.5", "int")),
    "filter_eps 0": ({"filter_eps": 0.0}, ValueError, ("filter_eps", "0.0", "between 0 and 1")),
    "filter_eps 1": ({"filter_eps": 1.0}, ValueError, ("filter_eps", "1.0", "between 0 and 1")),
    "filter_eps NaN": ({"filter_eps": math.nan}, ValueError, ("filter_eps", "nan", "between 0 and 1")),
    "filter_eps a string": ({"filter_eps": "a"}, TypeError, ("filter_eps", "'a'", "between 0 and 1")),
    "temperature a string": ({"temperature": "x"}, TypeError, ("temperature", "'x'", "above 0")),
    "temperature 0": ({"temperature": 0.0}, ValueError, ("temperature", "0.0", "above 0")),
    "logit_scale −1": ({"logit_scale": -1.0}, ValueError, ("logit_scale", "-1.0", "above 0")),
    "softcap inf": ({"softcap": math.inf}, ValueError, ("softcap", "inf", "finite")),
    "a statistic unknown": ({"stats": ("kl",)}, ValueError, ("stats", "'kl'", "'dropped_mass'")),
    "a statistic twice": ({"stats": ("lse", "lse")}, ValueError, ("stats", "lse", "repeat")),
    "stats a string": ({"stats": "lse"}, TypeError, ("stats", "'lse'", "tuple")),
    "reduction none": ({"reduction": "none"}, ValueError, ("reduction", "none", "mean")),
    "cu_seqlens of floats": (
        {"hidden": PACKED, "labels": LABELS.view(-1), "cu_seqlens": torch.tensor([0.0, 6.0])},
        TypeError,
        ("cu_seqlens", "torch.float32", "int32"),
    ),
    "cu_seqlens of two dimensions": (
        {"hidden": PACKED, "labels": LABELS.view(-1), "cu_seqlens": torch.tensor([[0, 6]])},
        ValueError,
        ("cu_seqlens", "(1, 2)", "(S+1,)"),
    ),
    "cu_seqlens with a batch": (
        {"cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        ("cu_seqlens", "(2, 3, 4)", "(1, N, H)"),
    ),
    "cu_seqlens that end early": (
        {"hidden": PACKED, "labels": LABELS.view(-1), "cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        ("cu_seqlens", "[0, 5]", "6"),
    ),
    "ld_alpha a string": ({"ld_alpha": "x"}, TypeError, ("ld_alpha", "'x'", "finite")),
    "ld_alpha NaN": ({"ld_alpha": math.nan}, ValueError, ("ld_alpha", "nan", "finite")),
    "shared_lengths without ld_alpha": (
        {"shared_lengths": LABELS[:, 0], "reduction": "sum"},
        ValueError,
        ("shared_lengths", "ld_alpha"),
    ),
    "ld_alpha with an odd number": (
        {"hidden": HIDDEN[:1], "labels": LABELS[:1], "ld_alpha": 0.5},
        ValueError,
        ("ld_alpha", "even", "1"),
    ),
}


@pytest.mark.parametrize(("changed", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(changed: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "bias": BIAS, **changed}
    of_sequences = {"reduction", "cu_seqlens", "ld_alpha", "shared_lengths"} & changed.keys()
    names = NAMES[1:] if of_sequences else NAMES
    for name in names:
        with pytest.raises(kind) as caught:
            getattr(fastpref, name)(**arguments)
        for word in words:
            assert word in str(caught.value)


@packages
def test_tokens_but_no_sequence_are_refused(package: Any) -> None:
    arguments = (PACKED.clone().requires_grad_(), WEIGHT, LABELS.view(-1))
    calls: dict[str, dict[str, Any]] = {
        "linear_sequence_logprobs": {},
        "linear_dpo_loss": {"reference_free": True},
        "linear_preference_loss": {"loss_fn": lambda logps: logps.sum(-1), "group_size": 2},
    }
    for name, options in calls.items():
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to the number of tokens, 6"):
            getattr(package, name)(*arguments, cu_seqlens=torch.tensor([0]), **options)

"""Log-probs from hidden states: values, statistics and all three gradients against the definition, and the edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.reference.logprobs import transform_logits
from fastpref_kernels.linear import COLUMNS
from tests.tolerance import ALL_STATS, DTYPES, assert_accurate

NAMES = ("linear_token_logprobs", "linear_sequence_logprobs")
MODES = ("auto", "save", "recompute")
# What a log-prob, or a statistic made of logits, may be off by.
BOUNDS = {torch.float16: 1e-4, torch.bfloat16: 1e-4, torch.float32: 1e-5, torch.float64: 1e-12}
both = pytest.mark.usefixtures("implementation")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
modes = pytest.mark.parametrize("mode", MODES)
Operands = dict[str, Tensor]


def make(
    rows: tuple[int, ...], vocabulary: int, features: int = 9, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> tuple[Operands, Tensor]:
    """Operands whose logits spread by about 3, and labels: the first and last entries, three tenths ignored."""
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(scale: float, *shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    operands = {
        "hidden": normal(1.0, *rows, features),
        "weight": normal(3 / math.sqrt(features), vocabulary, features),
    }
    if bias:
        operands["bias"] = normal(1.0, vocabulary)
    labels = torch.randint(vocabulary, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    if rows[-1] > 2:
        labels[..., -2], labels[..., -1] = 0, vocabulary - 1
    return operands, labels


def skip_unless_it_may_be_kept(mode: str, dtype: torch.dtype) -> None:
    if mode == "save" and dtype == torch.float16:
        pytest.skip("fp16 has not the range of the exponentials that are kept")


def magnitudes(operands: Operands, labels: Tensor, layouts: Any = None, **options: Any) -> dict[str, float]:
    """What each gradient's products sum, without their signs: terms that cancel, whose rounding stays.

    The transform is in the gradient of the logits, and a reduction of sequences in its scale.
    """
    laid = {name: (layouts or {}).get(name, lambda value: value)(value.double()) for name, value in operands.items()}
    hidden, weight = laid["hidden"], laid["weight"]
    logits = hidden @ weight.T + laid.get("bias", 0.0)
    if "cu_seqlens" in options and logits.dim() == 3:
        labels = labels.view(logits.shape[:-1])
    function = reference.sequence_logprobs if {"reduction", "cu_seqlens", "ld_alpha"} & options.keys() else None
    kept = {name: value for name, value in options.items() if name not in ("mode", "chunk_rows", "filter_eps", "stats")}
    stats = tuple(name for name in options.get("stats", ()) if name == "entropy")
    dz = run_logits(function or reference.token_logprobs, logits, labels, stats=stats, **kept).flatten(0, -2).abs()
    if stats:
        # An entropy's p (log p + H) cancels too, near the row's mass, before it is multiplied.
        z = transform_logits(logits, **{"temperature": 1.0, "logit_scale": 1.0, "softcap": None} | transform_of(kept))
        log_p = z.detach().nan_to_num(0.0, 0.0, 0.0).log_softmax(-1).flatten(0, -2)
        entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
        dz = dz + log_p.exp() * (entropy - log_p)
    rows = hidden.reshape(-1, hidden.shape[-1]).nan_to_num(0.0, 0.0, 0.0).abs()
    sums = {"dhidden": dz @ weight.abs(), "dweight": dz.T @ rows, "dbias": dz.sum(0)}
    return {name: value.max().item() if value.numel() else 0.0 for name, value in sums.items()}


def transform_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options that transform the logits."""
    return {name: options[name] for name in ("temperature", "logit_scale", "softcap") if name in options}


def run_logits(function: Callable[..., Any], logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The gradient of float64 logits, for the same incoming gradients as `run`'s."""
    operands = {"hidden": logits, "weight": logits.new_ones(1, 1)}
    return run(lambda z, _, y, __, **kept: function(z, y, **kept), operands, labels, frozen=("weight",), **options)[
        "dhidden"
    ]


def run(
    function: Callable[..., Any], operands: Operands, labels: Tensor, dtype: torch.dtype | None = None,
    layouts: dict[str, Callable[[Tensor], Tensor]] | None = None, frozen: tuple[str, ...] = (), **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Call `function`: its outputs by name, and the gradient of every operand that is not frozen, by `d` and its name.

    The incoming gradients of `logprobs` and `entropy` are the same float32 numbers for every dtype.
    """
    leaves = {
        name: value.to(dtype or value.dtype, copy=True).requires_grad_(name not in frozen)
        for name, value in operands.items()
    }
    laid = {name: (layouts or {}).get(name, lambda value: value)(leaf) for name, leaf in leaves.items()}
    result = function(laid["hidden"], laid["weight"], labels, laid.get("bias"), **options)
    outputs = result._asdict() if isinstance(result, tuple) else {"logprobs": result}
    generator = torch.Generator().manual_seed(7)
    differentiable = [outputs[name] for name in ("logprobs", "entropy") if name in outputs]
    incoming = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in differentiable]
    torch.autograd.backward(differentiable, incoming)
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            outputs[f"d{name}"] = leaf.grad
    return {name: value.detach() for name, value in outputs.items()}


def assert_matches_reference(name: str, operands: Operands, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    """Hold `fastpref.<name>` against `fastpref.reference.<name>` on the same operands. Returns ours."""
    definition = getattr(reference, name)
    truth = run(definition, operands, labels, torch.float64, **options)
    eager = run(definition, operands, labels, **options)
    ours = run(getattr(fastpref, name), operands, labels, **options)
    assert ours.keys() == truth.keys()
    summed = magnitudes(operands, labels, **options)
    dtype = operands["hidden"].dtype
    bound = BOUNDS[dtype]
    for field, value in ours.items():
        if field.startswith("d") and field != "dropped_mass":
            assert_accurate(value, eager[field], truth[field], field, summed=summed[field])
            continue
        assert value.shape == truth[field].shape
        assert value.dtype == eager[field].dtype
        if not value.is_floating_point():
            assert torch.equal(value, truth[field]), field
            continue
        # Beside the absolute bound, the rounding of a float32 as large as the answer.
        relative = 1e-5 if name == NAMES[1] and field == "logprobs" and dtype != torch.float64 else bound / 10
        torch.testing.assert_close(value.double(), truth[field], atol=bound, rtol=min(relative, 1e-5))
    assert not (ours["logprobs"] > 0).any()
    return ours


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
        """Operands whose row n has the logits of columns[n]: some given by index, the others about one level."""
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
        with pytest.raises(ValueError, match=r"mode=.save.*fp16.*recompute"):
            run(fastpref.linear_token_logprobs, operands, labels, mode="save")

    @dtypes
    def test_outputs_are_never_narrower_than_float32(self, dtype: torch.dtype) -> None:
        operands, labels = make((2, 4), 31, dtype=dtype)
        result = run(fastpref.linear_token_logprobs, operands, labels, stats=(*ALL_STATS, "dropped_mass"))
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        for name, value in result.items():
            if name != "is_top1":
                assert value.dtype == (dtype if name in ("dhidden", "dweight", "dbias") else wanted), name


LAYOUTS: dict[str, tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    # name: the operand, the base's shape, and the view of it that has shape (3, 5, 9), (37, 9) or (37,)
    "hidden, transposed batch and time": ("hidden", (5, 3, 9), lambda base: base.transpose(0, 1)),
    "hidden, transposed features": ("hidden", (3, 9, 5), lambda base: base.transpose(1, 2)),
    "hidden, padded features": ("hidden", (3, 5, 16), lambda base: base[..., 3:12]),
    "hidden, every second time": ("hidden", (3, 10, 9), lambda base: base[:, ::2]),
    "hidden, every second feature": ("hidden", (3, 5, 18), lambda base: base[..., ::2]),
    "hidden, expanded batch": ("hidden", (1, 5, 9), lambda base: base.expand(3, 5, 9)),
    "hidden, expanded features": ("hidden", (3, 5, 1), lambda base: base.expand(3, 5, 9)),
    "weight, transposed": ("weight", (9, 37), lambda base: base.T),
    "weight, padded features": ("weight", (37, 16), lambda base: base[:, 3:12]),
    "weight, every second row": ("weight", (74, 9), lambda base: base[::2]),
    "weight, every second feature": ("weight", (37, 18), lambda base: base[:, ::2]),
    "weight, expanded rows": ("weight", (1, 9), lambda base: base.expand(37, 9)),
    "weight, expanded features": ("weight", (37, 1), lambda base: base.expand(37, 9)),
    "bias, every second entry": ("bias", (74,), lambda base: base[::2]),
    "bias, expanded": ("bias", (1,), lambda base: base.expand(37)),
}


@both
class TestStrides:
    @narrow
    @pytest.mark.parametrize(("operand", "shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
    def test_operands(
        self, operand: str, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        operands, labels = make((3, 5), 37, dtype=dtype)
        base = torch.randn(shape).to(dtype)
        assert layout(base).shape == operands[operand].shape
        operands[operand] = base
        for mode in ("save", "recompute"):
            layouts = {operand: layout}
            assert_matches_reference("linear_token_logprobs", operands, labels, layouts=layouts, mode=mode)

    @pytest.mark.parametrize("kind", ["expanded scalar", "expanded row", "transposed", "every second"])
    @pytest.mark.parametrize("mode", ["save", "recompute"])
    def test_incoming_gradient(self, mode: str, kind: str) -> None:
        operands, labels = make((3, 5), 37)
        incoming = {
            "expanded scalar": torch.tensor(1.7).expand(3, 4),
            "expanded row": torch.randn(4).expand(3, 4),
            "transposed": torch.randn(4, 3).T,
            "every second": torch.randn(3, 8)[:, ::2],
        }[kind]
        found = []
        for grad in (incoming, incoming.contiguous()):
            leaves = [value.clone().requires_grad_() for value in operands.values()]
            result = fastpref.linear_token_logprobs(*leaves[:2], labels, leaves[2], mode=mode, stats=("entropy",))
            torch.autograd.backward([result.logprobs, result.entropy], [grad, grad])
            found.append([leaf.grad for leaf in leaves])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)

    def test_incoming_gradient_of_sequences(self) -> None:
        operands, labels = make((3, 5), 37)
        found = []
        for grad in (torch.tensor(1.7).expand(3), torch.full((3,), 1.7)):
            leaves = [value.clone().requires_grad_() for value in operands.values()]
            fastpref.linear_sequence_logprobs(*leaves[:2], labels, leaves[2]).backward(grad)
            found.append([leaf.grad for leaf in leaves])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


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


@both
@modes
class TestGraph:
    @pytest.mark.parametrize(
        "frozen",
        [("weight", "bias"), ("hidden", "bias"), ("hidden", "weight"), ("weight",), ("hidden",), ("bias",)],
        ids=",".join,
    )
    def test_frozen_operands_get_no_gradient(self, frozen: tuple[str, ...], mode: str) -> None:
        operands, labels = make((2, 5), 37)
        wanted = run(fastpref.linear_token_logprobs, operands, labels, mode=mode)
        found = run(fastpref.linear_token_logprobs, operands, labels, mode=mode, frozen=frozen)
        assert {name for name in wanted if name not in found} == {f"d{name}" for name in frozen}
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name])

    def test_no_grad(self, mode: str) -> None:
        operands, labels = make((2, 5), 37)
        hidden, weight, bias = (value.requires_grad_() for value in operands.values())
        wanted = fastpref.linear_token_logprobs(hidden, weight, labels, bias, mode=mode)
        assert wanted.requires_grad
        with torch.no_grad():
            found = fastpref.linear_token_logprobs(hidden, weight, labels, bias, mode=mode)
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-6)

    @narrow
    def test_retain_graph_gives_the_same_gradient_again(self, dtype: torch.dtype, mode: str) -> None:
        operands, labels = make((2, 5), 37, dtype=dtype)
        leaves = [value.requires_grad_() for value in operands.values()]
        result = fastpref.linear_token_logprobs(*leaves[:2], labels, leaves[2], mode=mode).square().sum()
        first = torch.autograd.grad(result, leaves, retain_graph=True)
        second = torch.autograd.grad(result, leaves)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)
        with pytest.raises(RuntimeError, match="second time"):
            result.backward()

    def test_a_write_to_the_results_changes_no_gradient(self, mode: str) -> None:
        operands, labels = make((2, 5), 37)

        def gradients(write: bool) -> tuple[Tensor, ...]:
            leaves = [value.clone().requires_grad_() for value in operands.values()]
            result = fastpref.linear_token_logprobs(*leaves[:2], labels, leaves[2], mode=mode, stats=("lse", "entropy"))
            total = 2.0 * result.logprobs.sum() + result.entropy.sum()
            if write:
                for value in result:
                    value.detach().fill_(9.0)
            return torch.autograd.grad(total, leaves)

        for one, other in zip(gradients(False), gradients(True), strict=True):
            assert torch.equal(one, other)

    def test_gradients_accumulate(self, mode: str) -> None:
        operands, labels = make((2, 5), 37, dtype=torch.float64)

        def gradients(package: Any) -> list[Tensor | None]:
            leaves = [value.clone().requires_grad_() for value in operands.values()]
            for temperature in (1.0, 2.0):
                options = {"temperature": temperature, "mode": mode}
                package.linear_token_logprobs(*leaves[:2], labels, leaves[2], **options).sum().backward()
            return [leaf.grad for leaf in leaves]

        for ours, wanted in zip(gradients(fastpref), gradients(reference), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)

    @narrow
    def test_a_loss_scale_scales_the_gradient(self, dtype: torch.dtype, mode: str) -> None:
        operands, labels = make((2, 5), 37, dtype=dtype)

        def gradients(scale: float) -> tuple[Tensor, ...]:
            leaves = [value.clone().requires_grad_() for value in operands.values()]
            total = fastpref.linear_sequence_logprobs(*leaves[:2], labels, leaves[2], mode=mode).sum()
            return torch.autograd.grad(total * scale, leaves)

        for plain, scaled in zip(gradients(1.0), gradients(65536.0), strict=True):
            torch.testing.assert_close(scaled, plain * 65536)

    @pytest.mark.usefixtures("unpoisoned")
    @narrow
    def test_two_runs_agree_bit_for_bit(self, dtype: torch.dtype, mode: str) -> None:
        operands, labels = make((4, 9), 1031, 33, dtype=dtype)
        for stats in ((), ("entropy",)):
            first, second = (
                run(fastpref.linear_token_logprobs, operands, labels, mode=mode, stats=stats) for _ in range(2)
            )
            for name, value in first.items():
                assert torch.equal(value, second[name]), name

    def test_autocast_casts_float32_operands(self, mode: str) -> None:
        operands, labels = make((3, 7), 131)
        rounded = {name: value.bfloat16() for name, value in operands.items()}
        truth = run(reference.linear_token_logprobs, rounded, labels, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            eager = run(reference.linear_token_logprobs, operands, labels, mode=mode)
            ours = run(fastpref.linear_token_logprobs, operands, labels, mode=mode)
            mixed = run(fastpref.linear_token_logprobs, {**operands, "hidden": rounded["hidden"]}, labels, mode=mode)
        assert {value.dtype for value in ours.values()} == {torch.float32}
        assert mixed["dhidden"].dtype == torch.bfloat16
        torch.testing.assert_close(mixed["logprobs"], ours["logprobs"], rtol=0, atol=0)
        torch.testing.assert_close(ours["logprobs"].double(), truth["logprobs"], rtol=1e-6, atol=1e-4)
        for name in ("dhidden", "dweight", "dbias"):
            # They have passed through the cast's backward.
            assert_accurate(ours[name].bfloat16(), eager[name].bfloat16(), truth[name], name)

    @pytest.mark.parametrize("chunk_rows", [None, 24])
    def test_autocast_rounds_nothing_but_the_operands(self, chunk_rows: int | None, mode: str) -> None:
        operands, labels = make((8, 12), 131)
        rounded = {name: value.bfloat16() for name, value in operands.items()}
        # "auto" makes the gradients in the loss's forward where there are several chunks.
        options = {"chunk_rows": chunk_rows, "mode": mode}

        def tokens(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
            return fastpref.linear_token_logprobs(hidden, weight, labels, bias, **options)

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
            return fastpref.linear_dpo_loss(hidden, weight, labels, bias=bias, reference_free=True, **options).loss

        for function in (tokens, loss):
            wanted = run(function, rounded, labels)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = run(function, operands, labels)
            for name, value in found.items():
                assert torch.equal(value.to(wanted[name].dtype), wanted[name]), name

    def test_autocast_leaves_float64_alone(self, mode: str) -> None:
        operands, labels = make((2, 5), 31, dtype=torch.float64)
        wanted = run(fastpref.linear_token_logprobs, operands, labels, mode=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = run(fastpref.linear_token_logprobs, operands, labels, mode=mode)
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-13, atol=1e-13)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("unpoisoned", "fresh_compiler")
@pytest.mark.parametrize("stats", [(), ("entropy", "lse")], ids=["plain", "statistics"])
def test_compiles_to_one_graph(stats: tuple[str, ...]) -> None:
    operands, labels = make((3, 6), 61)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, **options: Any) -> Any:
        return fastpref.linear_token_logprobs(hidden, weight, labels, bias, softcap=5.0, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = run(step, operands, labels, stats=stats)
    for name, value in run(compiled, operands, labels, stats=stats).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("unpoisoned", "fresh_compiler")
@pytest.mark.parametrize("name", [*NAMES, "linear_dpo_loss"])
def test_compiles_to_one_graph_without_gradients(name: str) -> None:
    operands, labels = make((4, 6), 61)
    hidden, weight, bias = (value.requires_grad_() for value in operands.values())
    options: dict[str, Any] = {"bias": bias, "stats": ("lse", "dropped_mass"), "filter_eps": 0.01}
    if name == "linear_dpo_loss":
        options["reference_free"] = True

    def step(hidden: Tensor, weight: Tensor) -> Any:
        return getattr(fastpref, name)(hidden, weight, labels, **options)

    def inside(hidden: Tensor, weight: Tensor) -> Any:
        with torch.no_grad():
            return step(hidden, weight)

    with torch.no_grad():
        wanted = step(hidden, weight)
    for around, body in ((torch.no_grad, step), (torch.inference_mode, step), (torch.enable_grad, inside)):
        torch.compiler.reset()
        with around():
            found = torch.compile(body, fullgraph=True, backend="aot_eager")(hidden, weight)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
    options["bias"] = bias.detach()
    torch.compiler.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden.detach(), weight.detach())
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("unpoisoned", "fresh_compiler")
@pytest.mark.parametrize("chunk_rows", [None, 12])
def test_a_loss_and_its_reference_compile_to_one_graph(chunk_rows: int | None) -> None:
    operands, labels = make((4, 6), 61, bias=False)
    ref = {f"ref_{name}": value + 0.1 for name, value in operands.items()}

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, bias: None) -> Tensor:
        return fastpref.linear_dpo_loss(hidden, weight, labels, chunk_rows=chunk_rows, **ref).loss

    wanted = run(step, operands, labels)
    found = run(torch.compile(step, fullgraph=True, backend="aot_eager"), operands, labels)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_forward_mode_is_refused() -> None:
    operands, labels = make((2, 4), 31)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(
            lambda hidden: fastpref.linear_token_logprobs(hidden, operands["weight"], labels),
            (operands["hidden"],), (operands["hidden"],),
        )  # fmt: skip


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
        {"hidden": PACKED, "labels": LABELS.view(-1), "cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError,
        ("cu_seqlens", "torch.float32", "int32"),
    ),
    "cu_seqlens of two dimensions": (
        {"hidden": PACKED, "labels": LABELS.view(-1), "cu_seqlens": torch.tensor([[0, 6]])}, ValueError,
        ("cu_seqlens", "(1, 2)", "(S+1,)"),
    ),
    "cu_seqlens with a batch": (
        {"cu_seqlens": torch.tensor([0, 6])}, ValueError, ("cu_seqlens", "(2, 3, 4)", "(1, N, H)"),
    ),
    "cu_seqlens that end early": (
        {"hidden": PACKED, "labels": LABELS.view(-1), "cu_seqlens": torch.tensor([0, 5])}, ValueError,
        ("cu_seqlens", "[0, 5]", "6"),
    ),
    "ld_alpha a string": ({"ld_alpha": "x"}, TypeError, ("ld_alpha", "'x'", "finite")),
    "ld_alpha NaN": ({"ld_alpha": math.nan}, ValueError, ("ld_alpha", "nan", "finite")),
    "shared_lengths without ld_alpha": (
        {"shared_lengths": LABELS[:, 0], "reduction": "sum"}, ValueError, ("shared_lengths", "ld_alpha"),
    ),
    "ld_alpha with an odd number": (
        {"hidden": HIDDEN[:1], "labels": LABELS[:1], "ld_alpha": 0.5}, ValueError, ("ld_alpha", "even", "1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "kind", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("package", [fastpref, reference], ids=["fastpref", "reference"])
def test_refused(package: Any, changed: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "bias": BIAS, **changed}
    of_sequences = {"reduction", "cu_seqlens", "ld_alpha", "shared_lengths"} & changed.keys()
    names = NAMES[1:] if of_sequences else NAMES
    for name in names:
        with pytest.raises(kind) as caught:
            getattr(package, name)(**arguments)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("package", [fastpref, reference], ids=["fastpref", "reference"])
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

"""Log-probs from hidden states under autograd, autocast and torch.compile, and with strided operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import reference
from tests.helpers.linear_logprobs import LAYOUTS, NAMES, assert_matches_reference, make, modes, run
from tests.helpers.marks import both, narrow
from tests.tolerance import assert_accurate


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
            (operands["hidden"],),
            (operands["hidden"],),
        )

"""Each library's matrix product on a CPU is right alone, for operands of every layout, stride and size."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.testing.product_cases import LAYOUTS, ROUTES, SIZES, Product, multiply
from fastpref_kernels import cpu, linear
from fastpref_kernels.contract import widened
from fastpref_kernels.cpu import linear as cpu_linear

CPU = torch.device("cpu")
# TINY is multiplied in every pair of layouts. LARGE, which ends within a block, is multiplied in fewer of them.
TINY = tuple(itertools.product((1, 2, 3), repeat=3))
LARGE = ((70, 66, 1031), (1, 130, 1026), (4097, 1, 5), (1, 1, 4097))
ALL_ROUTES = {
    **{name: (lambda device=CPU, route=route: route.product(device)) for name, route in ROUTES.items()},
    "PyTorch": lambda: linear.library_product,
}
OPERANDS = [
    *((name, dtype) for name, route in ROUTES.items() for dtype in route.dtypes),
    *(("PyTorch", dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)),
]


def product_of(route: str) -> Product:
    """Return the function of a route, or skip the test and say what this machine lacks for it."""
    product = ALL_ROUTES[route]()
    if product is None:
        pytest.skip(f"{route} cannot run here: the machine lacks {ROUTES[route].lacks}")
    return product


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def assert_right(found: Tensor, left: Tensor, right: Tensor, start: Tensor | float, what: str) -> None:
    """Compare with float64, within the worst that roundings of sums in some order can add up to."""
    terms = left.double().abs() @ right.double().abs() + torch.as_tensor(start).double().abs()
    allowed = (left.shape[1] + 1) * torch.finfo(found.dtype).eps * terms
    error = (found.double() - (left.double() @ right.double() + start)).abs()
    assert (error <= allowed).all(), f"{what}: {error.max():.1e} off, or NaN"


def assert_every_size(product: Product, dtype: torch.dtype, left_layout: str) -> None:
    """Hold a product with its left operand in a layout, and the right one in every layout, against float64."""
    for right_layout in LAYOUTS:
        few = "contiguous" not in (left_layout, right_layout) and left_layout != right_layout
        for rows, columns, terms in TINY if few else (*TINY, *SIZES, *LARGE):
            left = LAYOUTS[left_layout](normal(rows, terms, dtype=dtype))
            right = LAYOUTS[right_layout](normal(terms, columns, dtype=dtype))
            start = normal(rows, columns, dtype=widened(dtype))
            found = multiply(product, left, right, start)
            what = f"{rows} x {terms} {left_layout}, {terms} x {columns} {right_layout}"
            assert_right(found.product, left, right, 0.0, what)
            assert_right(found.added, left, right, start, f"{what}, added")


@pytest.mark.parametrize(("route", "dtype"), OPERANDS, ids=str)
@pytest.mark.parametrize("left_layout", LAYOUTS)
def test_every_layout_and_size(route: str, dtype: torch.dtype, left_layout: str) -> None:
    assert_every_size(product_of(route), dtype, left_layout)


@pytest.mark.parametrize("route", ["used", "oneDNN"])
@pytest.mark.parametrize("left_layout", LAYOUTS)
def test_every_layout_and_size_without_a_compiler(
    route: str, left_layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = product_of(route)
    monkeypatch.setattr(cpu, "native", lambda: None)
    assert_every_size(product, torch.float32, left_layout)


@pytest.mark.parametrize("route", ["MKL", "oneDNN blocks"])
class TestBfloat16Gemm:
    """The operator raises for what it cannot multiply, and its message names the operand."""

    @pytest.mark.parametrize(
        ("out", "left", "right", "words"),
        [
            ((3, 4), (3, 5), (6, 4), r"got out \[3, 4\], left \[3, 5\], right \[6, 4\]"),
            ((4, 4), (3, 5), (5, 4), r"got out \[4, 4\], left \[3, 5\]"),
            ((3, 5), (3, 5), (5, 4), r"got out \[3, 5\], left \[3, 5\]"),
            ((3, 4), (15,), (5, 4), r"left must be a matrix of BFloat16 on the CPU; got sizes \[15\]"),
            ((3, 4), (3, 5), (1, 5, 4), r"right must be a matrix of BFloat16 on the CPU; got sizes \[1, 5, 4\]"),
        ],
    )
    def test_shapes(
        self, route: str, out: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], words: str
    ) -> None:
        operands = (torch.zeros(left).bfloat16(), torch.zeros(right).bfloat16())
        with pytest.raises(RuntimeError, match=words):
            product_of(route)(torch.zeros(out), *operands, False)

    @pytest.mark.parametrize(("wrong", "name"), [(0, "out"), (1, "left"), (2, "right")])
    def test_dtypes(self, route: str, wrong: int, name: str) -> None:
        given = [torch.zeros(3, 3), torch.zeros(3, 3).bfloat16(), torch.zeros(3, 3).bfloat16()]
        given[wrong] = given[wrong].half()
        with pytest.raises(RuntimeError, match=f"{name} must be a matrix of .* got sizes .*, Half"):
            product_of(route)(*given, False)

    @pytest.mark.parametrize("strides", [(1, 3), (8, 2), (0, 1), (3, 1)])
    def test_rows_of_the_result_that_are_not_contiguous(self, route: str, strides: tuple[int, int]) -> None:
        out, operands = torch.zeros(24).as_strided((3, 4), strides), (torch.ones(3, 5), torch.ones(5, 4))
        operands = tuple(operand.bfloat16() for operand in operands)
        with pytest.raises(RuntimeError, match="out must have contiguous rows that do not overlap"):
            product_of(route)(out, *operands, False)
        assert not out.any()

    @pytest.mark.parametrize(("rows", "columns", "strides"), [(1, 4, (1, 1)), (1, 4, (0, 1)), (3, 1, (2, 0))])
    def test_a_stride_without_a_meaning_is_not_looked_at(
        self, route: str, rows: int, columns: int, strides: tuple[int, int]
    ) -> None:
        out = torch.full((8,), torch.nan).as_strided((rows, columns), strides)
        product_of(route)(out, torch.ones(rows, 5).bfloat16(), torch.ones(5, columns).bfloat16(), False)
        assert (out == 5).all()

    def test_a_step_that_32_bits_do_not_hold(self, route: str, tmp_path: Path) -> None:
        product, step = product_of(route), 2**31
        # A file with holes takes no memory where nothing is written.
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=step + 2)
        far = memory.view(torch.bfloat16).as_strided((2, 2), (step, 1))
        far.copy_(torch.tensor([[1, 2], [3, 4]]))
        for left, right in ((far, far), (far.t(), far), (far, far.t())):
            out = torch.full((2, 2), torch.nan)
            product(out, left, right, False)
            assert torch.equal(out, left.float() @ right.float())
        out = memory.as_strided((2, 2), (step, 1)).zero_()
        one = torch.ones(2, 2).bfloat16()
        with pytest.raises(RuntimeError, match=r"MKL's sizes are 32-bit: out|rows of out must be no more than"):
            product(out, one, one, False)
        assert not out.any()


def test_a_size_that_32_bits_do_not_hold() -> None:
    one = torch.ones(1, 1).bfloat16()
    with pytest.raises(RuntimeError, match="MKL's sizes are 32-bit: out"):
        product_of("MKL")(torch.zeros(1, 1), one.expand(1, 2**31), one.expand(2**31, 1), False)


def test_a_route_that_is_not_there_is_named() -> None:
    native = cpu.native()
    assert native is not None
    one = torch.ones(1, 1)
    with pytest.raises(RuntimeError, match=r"route must be one of .*; got abacus"):
        native.bf16_gemm(one, one.bfloat16(), one.bfloat16(), False, route="abacus")


class TestFromHiddenStates:
    """MKL refuses operands of one row or column whose layout and leading dimension do not agree."""

    def test_one_feature(self) -> None:
        hidden, weight = torch.randn(1, 9, 1).bfloat16(), torch.randn(100, 1).bfloat16()
        labels = torch.randint(100, (1, 9))
        truth = reference.linear_token_logprobs(hidden.double(), weight.double(), labels, shift=False)
        found = fastpref.linear_token_logprobs(hidden, weight, labels, shift=False)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", ["save", "recompute"])
    def test_a_vocabulary_of_one(self, mode: str) -> None:
        fastpref.release_memory()  # what an earlier test has left there could be the right zeros
        hidden = torch.randn(1, 9, 64).bfloat16().requires_grad_()
        weight = torch.randn(1, 64).bfloat16().requires_grad_()
        labels = torch.zeros(1, 9, dtype=torch.int64)
        logps = fastpref.linear_token_logprobs(hidden, weight, labels, shift=False, mode=mode)
        logps.sum().backward()
        for value in (logps, hidden.grad, weight.grad):
            assert value is not None
            assert (value == 0).all()

    @pytest.mark.parametrize("mode", ["save", "recompute"])
    @pytest.mark.parametrize("vocabulary", [4097, 8193])
    def test_one_token_more_than_the_columns_of_a_tile(self, vocabulary: int, mode: str) -> None:
        hidden = torch.randn(1, 40, 64).bfloat16()
        weight = torch.randn(vocabulary, 64).bfloat16().requires_grad_()
        labels = torch.randint(vocabulary, (1, 40))
        labels[0, ::3] = vocabulary - 1
        scoring = {"shift": False, "mode": mode, "filter_eps": 1e-2}
        fastpref.linear_token_logprobs(hidden, weight, labels, **scoring).sum().backward()
        exact = weight.detach().double().requires_grad_()
        reference.linear_token_logprobs(hidden.double(), exact, labels, shift=False).sum().backward()
        assert weight.grad is not None
        assert exact.grad is not None
        # Each row with the label adds to the gradient of the label's own column, whatever is filtered.
        truth = exact.grad[-1]
        assert truth.abs().max() > 3
        assert (weight.grad[-1] - truth).abs().max() < 0.01 * truth.abs().max()


class TestWhichProduct:
    def test_bfloat16_goes_to_the_faster_route(self) -> None:
        native = cpu.native()
        if not (native and native.has_bf16_gemm()):
            pytest.skip("the processor has neither AMX_BF16 nor a fast AVX512_BF16")
        assert cpu_linear.bf16_route() == native.bf16_routes()[0]
        out, one = torch.empty(3, 2), torch.ones(3, 2).bfloat16()
        cpu_linear.product(out, one, one[:2], False)
        assert (out == 2).all()
        # Operands that are widened are summed in another order.
        left, right = normal(64, 1031, dtype=torch.bfloat16), normal(1031, 64, dtype=torch.bfloat16)
        found, wanted = torch.empty(64, 64), torch.empty(64, 64)
        cpu_linear.product(found, left, right, False)
        native.bf16_gemm(wanted, left, right, False)
        assert torch.equal(found, wanted)
        assert not torch.equal(found, left.float() @ right.float())

    def test_a_process_without_onednn_does_without_its_bfloat16(self) -> None:
        """PyTorch's kernels on blocks raise there. A flag for TF32 warns where there is no GPU of Intel."""
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):  # type: ignore[arg-type]
            out, one = torch.empty(3, 2), torch.ones(3, 2).bfloat16()
            cpu_linear.product(out, one, one[:2], False)
            assert (out == 2).all()
            assert cpu_linear.bf16_route() != "oneDNN"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("rounds", [None, "strict", "BF16"])
    def test_onednn_is_not_used_where_the_environment_has_it_round(
        self, rounds: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called: list[int] = []
        monkeypatch.delenv("DNNL_DEFAULT_FPMATH_MODE", raising=False)
        monkeypatch.delenv("ONEDNN_DEFAULT_FPMATH_MODE", raising=False)
        if rounds is not None:
            monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", rounds)
        monkeypatch.setattr(cpu_linear, "_is_intel", lambda: False)
        monkeypatch.setattr(cpu_linear, "onednn_rounds", cpu_linear.onednn_rounds.__wrapped__)
        monkeypatch.setattr(cpu, "native", lambda: None)
        monkeypatch.setattr(cpu_linear, "onednn_product", lambda out, a, b, add: called.append(1))
        cpu_linear.product(torch.empty(3, 2), torch.ones(3, 5).to(dtype), torch.ones(5, 2).to(dtype), False)
        assert len(called) == (torch.backends.mkldnn.is_available() and rounds != "BF16")

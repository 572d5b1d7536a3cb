"""Which product a GPU's library is asked for, by the operators that a step calls. These tests need no GPU."""

from __future__ import annotations

import pytest
import torch

from fastpref_kernels import linear
from fastpref_kernels.linear import library
from tests.gpu_stand_in import on_gpu
from tests.host_waits import host_trace

pytest.importorskip("triton")
ONE_CALL, TWO_CALLS = ["aten.addmm.dtype_out"], ["aten.mm.dtype", "aten.add_.Tensor"]


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "add", "adds_wide", "operators"),
    [
        (torch.bfloat16, torch.float32, True, True, ONE_CALL),
        (torch.bfloat16, torch.float32, True, False, TWO_CALLS),
        (torch.float16, torch.float32, True, True, ONE_CALL),
        (torch.bfloat16, torch.float32, False, True, ["aten.mm.dtype_out"]),
        (torch.bfloat16, torch.bfloat16, False, True, ["aten.mm.out"]),
        (torch.float32, torch.float32, True, False, ["aten.addmm.out"]),
        (torch.float32, torch.float32, False, True, ["aten.mm.out"]),
        (torch.float64, torch.float64, True, True, ["aten.addmm.out"]),
    ],
)
def test_operators(
    dtype: torch.dtype, out_dtype: torch.dtype, add: bool, adds_wide: bool, operators: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(library, "_adds_wide", lambda: adds_wide)
    a, b = torch.randn(3, 4).to(dtype), torch.randn(4, 5).to(dtype)
    out = torch.ones(3, 5, dtype=out_dtype)
    wanted = a.double() @ b.double() + (1 if add else 0)
    given = on_gpu(out), on_gpu(a), on_gpu(b)
    with host_trace() as trace:
        library.library_product(*given, add)
    assert [operation.name for operation in trace.operations] == operators
    rounding = torch.finfo(out_dtype).eps * wanted.abs().max().item()
    torch.testing.assert_close(given[0].numbers.double(), wanted, rtol=0, atol=4 * rounding)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built for no GPU")
def test_a_pytorch_that_adds_wide_is_asked_to() -> None:
    assert library._adds_wide()


@pytest.mark.parametrize(("upstream", "operator"), [(0.3, "aten.mul.out"), (None, "aten.copy_.default")])
def test_a_gradient_is_scaled_and_rounded_in_one_pass(upstream: float | None, operator: str) -> None:
    total = torch.randn(5000, 3)
    given, factor = on_gpu(total), None if upstream is None else on_gpu(torch.tensor(upstream))
    backend = library.library_backend(linear.fold, linear.fold_backward)
    with host_trace() as trace:
        found = linear.scaled_gradient(backend, given, factor, torch.bfloat16)
    launched = [operation.name for operation in trace.operations if operation.name != "aten.detach.default"]
    assert launched == ["aten.empty.memory_format", operator]
    assert torch.equal(found.numbers, (total if upstream is None else total * upstream).bfloat16())

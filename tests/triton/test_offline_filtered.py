"""The kernels of a filtered gradient compiled, not run, for the GPUs they are meant for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import sass
from fastpref_kernels.contract import COLUMNS
from fastpref_kernels.linear.library import fresh_scratch
from fastpref_kernels.triton import filtered
from tests.triton.linkers import skip_without_linker

V = COLUMNS + 1280  # a last tile of its own width
modes = pytest.mark.parametrize("stored", [True, False], ids=["kept", "recomputed"])


def launch(stored: bool, dtype: torch.dtype = torch.bfloat16, *, R: int = 8, V: int = V, H: int = 256) -> None:
    """Launch every kernel of the gradients of R rows."""
    x, weight, bias, (grad, *norm) = torch.zeros(R, H), torch.zeros(V, H), torch.zeros(V), torch.zeros(4, R)
    keep, kept = torch.zeros(-(-V // COLUMNS), R, dtype=torch.bool), torch.zeros(R, V, dtype=dtype)
    given = (x.to(dtype), weight.to(dtype), bias.to(dtype), torch.zeros(R, dtype=torch.int64), keep, COLUMNS)
    filtered.filtered_gradients(
        *given, kept if stored else None, torch.stack(norm), grad, (1.0, 1.0, None), x, weight, bias, True,
        fresh_scratch,
    )  # fmt: skip


def programs(target: str, *arguments: Any, **sizes: int) -> list[sass.Program]:
    skip_without_linker(target)
    with sass.compiling(target) as compiled:
        launch(*arguments, **sizes)
    return [sass.read(kernel, target) for kernel in {id(kernel): kernel for kernel in compiled}.values()]


@pytest.mark.slow
@modes
@pytest.mark.parametrize("target", sass.TARGETS)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.bfloat16, V), (torch.bfloat16, V + 1), (torch.float32, V)],
    ids=["bf16", "bf16, unaligned", "fp32"],
)
def test_nothing_spills(dtype: torch.dtype, width: int, target: str, stored: bool) -> None:
    if (target, width, stored) == ("sm_80", V + 1, True):
        pytest.skip("elements that are loaded one by one take more addresses than an A100 has registers")
    found = programs(target, stored, dtype, V=width)
    assert {program.name for program in found} >= {"picked_product_kernel", "picked_sums_kernel"}
    for program in found:
        assert (program.spills, program.stack) == (0, 0), (program.name, program.constants)


@modes
def test_products_run_on_tensor_cores_and_move_16_bytes_at_a_time(stored: bool) -> None:
    """A product's loop loads nothing narrower but the indices of rows."""
    products = [program for program in programs("sm_90", stored) if program.name == "picked_product_kernel"]
    assert len(products) == (2 if stored else 3)
    for program in products:
        assert any(i.opcode.startswith("HGMMA") for i in program.instructions)
        (loop,) = (loop for loop in program.loops if loop.count("tensor"))
        assert loop.widths("load")[16]
        assert set(loop.widths("load")) <= ({8, 16} if program.constants.get("K", 0) is None else {16})


def test_no_tensor_core_rounds_a_float32_product() -> None:
    for program in programs("sm_90", False, torch.float32):
        assert all(i.pipe != "tensor" for i in program.instructions)


@modes
def test_other_rows_are_no_other_kernel(stored: bool) -> None:
    """Neither how many rows there are nor where their indices begin compiles anything in the middle of training."""
    found = []
    for R in (8, 1, 16, 33):
        with sass.compiling("sm_90") as compiled:
            launch(stored, R=R)
        found.append({id(kernel) for kernel in compiled})
    assert all(kernels == found[0] for kernels in found)


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


@contextmanager
def no_value_is_read() -> Iterator[None]:
    """Raise where an operator reads a tensor's values on the host, for which a device would have to be waited for."""

    class Reading(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not any(name in function.name() for name in WAITING), function.name()
            assert "index" not in function.name() or all(
                t is None or t.dtype != torch.bool for a in args if isinstance(a, (list, tuple)) for t in a
            )
            return function(*args, **(kwargs or {}))

    with Reading():
        yield


@modes
def test_the_host_waits_for_no_device(stored: bool) -> None:
    with sass.compiling("sm_90"), no_value_is_read():
        launch(stored)
        with pytest.raises(AssertionError):
            torch.ones(1).item()

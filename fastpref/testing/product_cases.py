"""Cases of matrix products: every library that a device can use, over layouts, strides and sizes of the operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.testing.case import DTYPES, Arguments, Case, Layout, as_it_is, normal
from fastpref_kernels import cpu, linear
from fastpref_kernels.contract import widened
from fastpref_kernels.cpu import linear as cpu_linear
from fastpref_kernels.precision import full_float32

Product = Callable[[Tensor, Tensor, Tensor, bool], None]
# Rows of the left operand, columns of the right one, and terms of each sum.
SIZES = (
    (0, 3, 2),
    (3, 0, 2),
    (3, 2, 0),
    (1, 1, 1),
    (9, 100, 1),
    (1, 64, 5),
    (9, 1, 64),
    (1, 1, 65),
    (2, 3, 2),
    (33, 65, 129),
    (65, 130, 66),
    (3, 4097, 17),
    (4097, 2, 31),
    (2, 3, 1025),
)
MARGIN = 2  # columns to each side of a result that is a slice


def rows_apart(x: Tensor) -> Tensor:
    """Return x as columns of a wider matrix that holds NaN elsewhere."""
    wide = x.new_full((x.shape[0], x.shape[1] + 3), torch.nan)
    wide[:, 1:-2] = x
    return wide[:, 1:-2]


def strided_by_one(x: Tensor) -> Tensor:
    """Return a matrix with strides (1, 1): its elements overlap unless a size is 1."""
    if not x.numel():
        return x
    return torch.cat([x[:, 0], x[-1, 1:]]).as_strided(x.shape, (1, 1))


def misaligned(x: Tensor) -> Tensor:
    """Return x one element after the start of its memory."""
    memory = x.new_empty(x.numel() + 1)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


LAYOUTS: dict[str, Layout] = {
    "contiguous": as_it_is,
    "transposed": lambda x: x.t().contiguous().t(),
    "rows apart": rows_apart,
    "columns apart": lambda x: rows_apart(x.t()).t(),
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row, expanded": lambda x: x[:1].expand_as(x),
    "one column, expanded": lambda x: x[:, :1].expand_as(x),
    "strides of 1": strided_by_one,
    "misaligned": misaligned,
}


class Route(NamedTuple):
    """A library's matrix product.

    Attributes:
        dtypes: the dtypes of operands that it supports.
        product: returns the function that multiplies on a device, or None if the device does not support it.
        lacks: what is missing on a machine that does not support it, starting with an instruction set.
    """

    dtypes: tuple[torch.dtype, ...]
    product: Callable[[torch.device], Product | None]
    lacks: str = ""


def _used(device: torch.device) -> Product:
    return cpu_linear.product if device.type == "cpu" else linear.library_product


def _bf16(route: str, device: torch.device) -> Product | None:
    native = cpu.native() if device.type == "cpu" else None
    return functools.partial(native.bf16_gemm, route=route) if native and route in native.bf16_routes() else None


def _onednn(device: torch.device) -> Product | None:
    usable = torch.backends.mkldnn.is_available() and not cpu_linear.onednn_rounds()
    return cpu_linear.onednn_product if device.type == "cpu" and usable else None


# "used" is the product that the operators call on a device. The others are those that they may call on a CPU.
ROUTES = {
    "used": Route(DTYPES, _used),
    "MKL": Route((torch.bfloat16,), functools.partial(_bf16, "MKL"), "AMX_BF16, or MKL in its torch"),
    "oneDNN blocks": Route((torch.bfloat16,), functools.partial(_bf16, "oneDNN"), "AVX512_BF16, or a newer torch"),
    "oneDNN": Route((torch.float32,), _onednn, "oneDNN in its torch, or its full precision"),
}


class Products(NamedTuple):
    """The results left @ right and start + left @ right."""

    product: Tensor
    added: Tensor


def multiply(product: Product, left: Tensor, right: Tensor, start: Tensor) -> Products:
    """Write a product to a slice of a wider matrix that holds NaN, and add it to a copy of `start`.

    Raises:
        RuntimeError: the product wrote outside the slice.
    """
    dtype = widened(left.dtype)
    wide = start.new_full((start.shape[0], start.shape[1] + 2 * MARGIN), torch.nan, dtype=dtype)
    out, added = wide[:, MARGIN:-MARGIN], start.to(dtype).clone()
    product(out, left, right, False)
    product(added, left, right, True)
    if not (wide[:, :MARGIN].isnan().all() and wide[:, -MARGIN:].isnan().all()):
        raise RuntimeError(f"the product of {tuple(left.shape)} and {tuple(right.shape)} wrote beside its result")
    return Products(out, added)


def product_cases() -> Iterator[Case]:
    """Yield the cases of every route: one operand in each layout, and the other contiguous."""
    pairs = dict.fromkeys(pair for layout in LAYOUTS for pair in ((layout, "contiguous"), ("contiguous", layout)))
    for route in ROUTES:
        for left, right in pairs:
            for size in SIZES:
                yield product_case(route, left, right, size)


def product_case(route: str, left: str, right: str, size: tuple[int, int, int]) -> Case:
    """Return the case of a product of a size, with each operand in a layout."""
    layouts = (LAYOUTS[left], LAYOUTS[right])
    rows, columns, terms = size
    function = "product" if route == "used" else f"product:{route}"
    return Case(
        name=f"{function}/{rows} x {terms} {left}, {terms} x {columns} {right}",
        function=functools.partial(_multiply, ROUTES[route], layouts),
        definition=functools.partial(_definition, layouts),
        draw=functools.partial(_draw, size),
        dtypes=ROUTES[route].dtypes,
        summed=functools.partial(_summed, layouts),
        runs_on=lambda device: ROUTES[route].product(device) is not None,
        slack=4.0,  # the library and float64 add up the terms in different orders
    )


def _multiply(route: Route, layouts: tuple[Layout, Layout], left: Tensor, right: Tensor, start: Tensor) -> Products:
    product = route.product(left.device)
    assert product is not None
    with full_float32():
        return multiply(product, layouts[0](left), layouts[1](right), start)


def _definition(layouts: tuple[Layout, Layout], left: Tensor, right: Tensor, start: Tensor) -> Products:
    dtype = widened(left.dtype)
    product = layouts[0](left).to(dtype) @ layouts[1](right).to(dtype)
    return Products(product, start.to(dtype) + product)


def _draw(size: tuple[int, int, int], generator: torch.Generator) -> Arguments:
    rows, columns, terms = size
    left, right = normal(generator, rows, terms), normal(generator, terms, columns)
    return {}, {"left": left, "right": right, "start": normal(generator, rows, columns)}


def _summed(layouts: tuple[Layout, Layout], leaves: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, float]:
    """Return the largest sum of the terms' magnitudes."""
    left, right, start = (constants[name] for name in ("left", "right", "start"))
    if not start.numel():
        return {}
    terms = layouts[0](left).abs() @ layouts[1](right).abs()
    return {"product": terms.max().item(), "added": (terms + start.abs()).max().item()}

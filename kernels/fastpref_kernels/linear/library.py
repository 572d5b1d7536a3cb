"""A backend of library products and PyTorch's memory, for any row passes of a device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels.contract import COLUMNS, widened
from fastpref_kernels.eager import linear as eager
from fastpref_kernels.linear.backend import Backend, Tile


@functools.cache
def _adds_wide() -> bool:
    """Return whether PyTorch can add a product of narrow operands to float32 sums in one call on CUDA and ROCm."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::addmm.dtype_out", "CUDA")


def library_product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Compute out (M, N) = a (M, K) @ b (K, N), or += it, with float32 sums whatever the operands' dtype.

    `out` is float32 (float64 for float64). If nothing is added, it may also have the operands' dtype. The sums are then
    rounded to it, and are rounded only once if the caller is in `full_float32`.
    """
    wide = widened(a.dtype)
    if a.dtype == out.dtype == wide:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not a.is_cuda:
        if out.dtype == wide:
            library_product(out, a.to(wide), b.to(wide), add)
        else:
            out.copy_(torch.mm(a.to(wide), b.to(wide)))
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _adds_wide():
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory from PyTorch's allocator."""
    return torch.empty(shape, dtype=dtype, device=device)


def fresh_scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory from PyTorch's allocator, which keeps freed memory itself."""
    del name
    return empty(shape, dtype, device)


def library_backend(
    fold: Callable[..., None], fold_backward: Callable[..., None], tile: Callable[[], Tile] | None = None,
    **kernels: Any,
) -> Backend:  # fmt: skip
    """Return a backend of library products and the given row passes, with tiles large enough to fill a GPU.

    Args:
        fold: see `Backend`.
        fold_backward: see `Backend`.
        tile: returns the size of a tile.
        kernels: other attributes of the backend; PyTorch's own operators stand in for those that are not given.
    """
    given = {"dot": eager.dot, "gather": eager.gather, "scatter": eager.scatter, "rescale": eager.rescale, **kernels}
    return Backend(
        library_product, fold, fold_backward, scratch=fresh_scratch, empty=empty, gradient_dtype=lambda dtype: dtype,
        tile=tile or (lambda: Tile(rows=4096, columns=COLUMNS)), whole=True, rounds=True, **given,
    )  # fmt: skip

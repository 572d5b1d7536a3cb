"""Run log-probs from hidden states on a CPU, with its products, its row passes, and memory kept between calls."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels import cpu, linear
from fastpref_kernels.contract import COLUMNS
from fastpref_kernels.cpu.sizes import ROWS, SUMMED
from fastpref_kernels.precision import own_precision

# The exponentials that a loss keeps at a time: 320 float32 rows of a vocabulary of 65536.
LOSS_BYTES = 80 << 20

_scratch = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory that this thread keeps for its next call: new memory costs as much as a fold.

    A forked child gets its own copy of what its parent's thread held; nothing is shared or locked.
    """
    held: dict[Any, Tensor] = _scratch.__dict__
    size = math.prod(shape)
    if name not in held or held[name].nbytes < size * dtype.itemsize:
        held[name] = empty((size * dtype.itemsize,), torch.uint8, device)
    return held[name][: size * dtype.itemsize].view(dtype).view(shape)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory for a result. From 4 MiB on, it reuses the memory of results that were freed."""
    native = cpu.native()
    return native.empty(list(shape), dtype) if native else torch.empty(shape, dtype=dtype, device=device)


def empty_like(tensor: Tensor) -> Tensor:
    """Return `torch.empty_like(tensor)`, with memory of `empty` if the result is contiguous."""
    dense = torch.empty_like(tensor, device="meta").is_contiguous()
    return empty(tensor.shape, tensor.dtype, tensor.device) if dense else torch.empty_like(tensor)


def release_memory(keep: int | None) -> None:
    """Free this thread's scratch and the memory of freed results; with `keep`, hold no more bytes from now on."""
    _scratch.__dict__.clear()
    native = cpu.loaded()
    if native:
        native.release_memory(keep)


@functools.cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@functools.cache
def onednn_rounds() -> bool:
    """Return whether an environment variable makes oneDNN round float32 operands, which no call can overrule."""
    modes = [os.environ.get(name) for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")]
    return any(mode is not None and mode.upper() != "STRICT" for mode in modes)


def _prefers_onednn() -> bool:
    """Return whether oneDNN multiplies float32 operands faster than PyTorch's own products."""
    return not _is_intel() and torch.backends.mkldnn.is_available() and not onednn_rounds()


def _widened(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix in `dtype`, in scratch memory if it must be converted. Keep its order, by rows or by columns."""
    if x.dtype == dtype:
        return x
    if x.stride(0) == 1 and x.stride(1) != 1:
        return _widened(name, x.t(), dtype).t()
    return scratch(name, tuple(x.shape), dtype, x.device).copy_(x)


def bf16_route() -> str:
    """Return what multiplies bfloat16 operands here: "MKL", "oneDNN", or "float32" if they are widened to float32."""
    native = cpu.native()
    return native.bf16_routes()[0] if native and native.has_bf16_gemm() else "float32"


def _overlaps(x: Tensor) -> bool:
    """Return whether lines of a matrix overlap without being the same, as only `as_strided` makes them."""
    (step, length), (line, _) = sorted(zip(x.stride(), x.shape, strict=True))
    return 0 < line < step * length


def onednn_product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Compute out (M, N) = a (M, K) @ b (K, N), or += it, all of them float32, by oneDNN."""
    native = cpu.native()
    if native:
        native.product(out, a, b, add, True)
        return
    if not add and not a.shape[1]:
        out.zero_()
    if _overlaps(b):  # which oneDNN refuses
        b = b.contiguous()
    # oneDNN sums all of K in one chain, whose error grows with its length. MKL sums blocks of a few hundred terms.
    for begin in range(0, a.shape[1], SUMMED):
        part = a[:, begin : begin + SUMMED], b[begin : begin + SUMMED].t()
        result = torch.ops.mkldnn._linear_pointwise(*part, None, "none", [], "")
        out.add_(result) if add or begin else out.copy_(result)


def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Compute out (M, N) = a (M, K) @ b (K, N), or += it, with float32 sums, by the library that is fastest at it.

    GF/s measured on two cores, N=512 rows, H=512: on a Xeon with AMX, bfloat16 by MKL's mixed product 1300 to 1550
    (the logits, and hidden's gradient) and 900 to 1340 (the weight's), float32 by MKL 325 to 340. On an EPYC with
    AVX512_BF16, bfloat16 by oneDNN's kernels on packed blocks 970 (the logits, and hidden's gradient) and 880 to 920
    (the weight's), where products that round to bfloat16 gave 955 to 1000; float32 by oneDNN 200 to 410, where MKL
    gave 150 to 190. On a Xeon with AVX512_BF16 and no AMX, products that round to bfloat16 gave 150, and float32 by MKL
    300. A dtype without a faster product of its own is widened to float32.
    """
    native = cpu.native()
    if native:
        native.product(out, a, b, add, _prefers_onednn())
        return
    a, b = _widened("left", a, out.dtype), _widened("right", b, out.dtype)
    if out.dtype == torch.float32 and _prefers_onednn():
        onednn_product(out, a, b, add)
    else:
        linear.library_product(out, a, b, add)


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    # fp16 has no product of its own here, so its tiles need not be rounded to it.
    return torch.float32 if dtype == torch.float16 else dtype


def fold(*arguments: Any) -> None:
    """Run `eager.linear.fold`, in C++ where it is built."""
    (cpu.native() or linear).fold(*arguments)


def fold_backward(*arguments: Any) -> None:
    """Run `eager.linear.fold_backward`, in C++ where it is built."""
    (cpu.native() or linear).fold_backward(*arguments)


BACKEND = linear.library_backend(fold, fold_backward, lambda: linear.Tile(ROWS, COLUMNS))._replace(
    product=product, scratch=scratch, empty=empty, gradient_dtype=_gradient_dtype, whole=False, rounds=False
)


# The place of `shares` among the arguments of the backward operators. Only a filter reads them.
_SHARES = 9


def _untold(arguments: tuple[Any, ...]) -> tuple[list[Any], int | None, float | None, tuple[Any, ...]]:
    """Split the arguments: return those before `rows`, `chunk_rows`, `filter_eps`, and all of them with `rows` None.

    On a CPU, counting the rows costs nothing, and it checks every label.
    """
    *given, _, chunk_rows, filter_eps = arguments
    return given, chunk_rows, filter_eps, (*given, None, chunk_rows, filter_eps)


@own_precision
def linear_logprobs(backend: linear.Backend, *arguments: Any) -> tuple[Tensor, ...]:
    """Run `fastpref::linear_logprobs`."""
    given, chunk_rows, filter_eps, arguments = _untold(arguments)
    native = cpu.native()
    if not native or filter_eps is not None:
        return linear.linear_logprobs(backend, *arguments)
    *fixed, statistics = native.linear_logprobs(*given, chunk_rows, _prefers_onednn())
    return (*fixed, *statistics)


@own_precision
def linear_logprobs_backward_(backend: linear.Backend, *arguments: Any) -> None:
    """Run `fastpref::linear_logprobs_backward_`."""
    given, chunk_rows, filter_eps, arguments = _untold(arguments)
    native = cpu.native()
    if not native or filter_eps is not None:
        linear.linear_logprobs_backward_(backend, *arguments)
    else:
        del given[_SHARES]
        native.linear_logprobs_backward_(*given, chunk_rows, _prefers_onednn())


@own_precision
def linear_logprobs_backward(backend: linear.Backend, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run `fastpref::linear_logprobs_backward`."""
    given, chunk_rows, filter_eps, arguments = _untold(arguments)
    native = cpu.native()
    if not native or filter_eps is not None:
        return linear.linear_logprobs_backward(backend, *arguments)
    del given[_SHARES]
    return native.linear_logprobs_backward(*given, chunk_rows, _prefers_onednn())

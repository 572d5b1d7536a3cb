"""Measure the speed of a copy, a read and matrix products; other figures are given as shares of these."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.sweep.case import JUDGED, Case, Trial, furthest, normal

GIB = 2**30
COPY, PRODUCT = "copy", "product, bfloat16 out"


def _copy(nbytes: int, device: str, rows: int) -> Trial:
    source = torch.ones(nbytes // 4, device=device)
    out = torch.empty_like(source)
    return Trial(lambda: out.copy_(source), lambda: furthest(out, source.double()), 0.0, 2 * nbytes / 1e9)


def _read(nbytes: int, device: str, rows: int) -> Trial:
    source = torch.ones(nbytes // 4, device=device)
    return Trial(source.sum, lambda: abs(source.sum().item() / source.numel() - 1), 1e-4, nbytes / 1e9)


def _product(n: int, wide: bool, device: str, rows: int) -> Trial:
    a, b = (normal(device, n, n, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=torch.float32 if wide else torch.bfloat16)
    keywords = {"out_dtype": torch.float32} if wide else {}

    def run() -> None:
        torch.mm(a, b, out=out, **keywords)

    def error() -> float:
        out.fill_(torch.nan)
        run()
        truth = a[:JUDGED].double() @ b.double()
        return furthest(out[:JUDGED], truth) / truth.abs().max().item()

    return Trial(run, error, 1e-5 if wide else 2**-8, tflop=2 * n**3 / 1e12)


def cases(small: bool) -> Iterator[Case]:
    """Yield the ceilings."""
    nbytes, n = (2**22, 256) if small else (2 * GIB, 8192)
    for kernel, function in ((COPY, _copy), ("read and sum", _read)):
        make = functools.partial(function, nbytes)
        yield Case("ceilings", kernel, "float32", 0, nbytes // 4, 0, "", make, compiles=False)
    for kernel, wide in ((PRODUCT, False), ("product, float32 out", True)):
        make = functools.partial(_product, n, wide)
        yield Case("ceilings", kernel, "bfloat16", n, n, n, "", make, compiles=False, cuda=wide)

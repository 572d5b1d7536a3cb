"""Vary the passes over logits: the block, the loads in flight, and the programs that share a row."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.sweep.case import JUDGED, Case, Trial, copies, furthest, furthest_ratio, normal, poisoned, replaced
from fastpref_kernels.contract import LogprobsResult, Statistic
from fastpref_kernels.triton import launches, logprobs

FORWARD, BACKWARD, STATISTICS = "logprobs_forward", "logprobs_backward", "logprobs_statistics"
BLOCKS = ((2048, 2), (2048, 4), (4096, 4), (4096, 8))
STAGES = (1, 3, 4)
STATS = (Statistic.ENTROPY | Statistic.MEAN_LOGITS | Statistic.IS_TOP1).value
SCORING = (-100, False, 1.0, 1.0, None, "none")


def _inputs(device: str, R: int, V: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    turns = copies(R * V * dtype.itemsize, device)
    return [
        (normal(device, 1, R, V, dtype=dtype, scale=3.0), torch.randint(V, (1, R), device=device)) for _ in range(turns)
    ]


def _truth(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probs, entropies and gradients of the first rows in float64."""
    log_p = logits[0, :JUDGED].double().log_softmax(-1)
    y = labels[0, :JUDGED, None]
    p = log_p.exp()
    gradient = -p
    gradient.scatter_add_(-1, y, torch.ones_like(y, dtype=p.dtype))
    return log_p.gather(-1, y)[:, 0], -(p * log_p).sum(-1), gradient


def _score(logits: Tensor, labels: Tensor, stats: int) -> LogprobsResult:
    return LogprobsResult.of(logprobs.logprobs(logits, labels, None, None, *SCORING, stats))


def _forward(R: int, V: int, dtype: torch.dtype, stats: int, device: str, rows: int) -> Trial:
    inputs = _inputs(device, rows, V, dtype)
    turns = itertools.cycle(inputs)

    def error() -> float:
        with poisoned():
            found = _score(*inputs[0], stats)
        logps, entropy, _ = _truth(*inputs[0])
        off = furthest(found.logps[0, :JUDGED], logps)
        if stats:
            off = max(off, furthest(found.norm[3, 0, :JUDGED], entropy))
        return off if found.logps.isfinite().all() and found.norm.isfinite().all() else float("nan")

    return Trial(lambda: _score(*next(turns), stats), error, 1e-4, rows * V * dtype.itemsize / 1e9)


def _backward(R: int, V: int, dtype: torch.dtype, device: str, rows: int) -> Trial:
    saved: list[tuple[Any, ...]] = []
    for logits, labels in _inputs(device, rows, V, dtype):
        found = _score(logits, labels, 0)
        given = (torch.empty_like(logits), torch.ones_like(found.logps), None, logits, labels, None, None)
        saved.append((*given, found.norm, found.counts, *SCORING))
    turns = itertools.cycle(saved)

    def error() -> float:
        out, *_ = saved[0]
        out.fill_(torch.nan)
        logprobs.logprobs_backward(*saved[0])
        off = furthest_ratio(out[0, :JUDGED], _truth(saved[0][3], saved[0][4])[2])
        return off if out.isfinite().all() else float("nan")

    def run() -> None:
        logprobs.logprobs_backward(*next(turns))

    return Trial(run, error, 2e-5 + torch.finfo(dtype).eps, 2 * rows * V * dtype.itemsize / 1e9)


@contextlib.contextmanager
def _shared(programs: int) -> Iterator[None]:
    """Let `programs` programs share a row, or as many as it has parts."""
    with mock.patch.object(launches, "row_programs", lambda rows, parts, multiprocessors: min(programs, parts)):
        yield


def _maker(kernel: str, R: int, V: int, dtype: torch.dtype) -> Callable[[str, int], Trial]:
    return {
        FORWARD: functools.partial(_forward, R, V, dtype, 0),
        STATISTICS: functools.partial(_forward, R, V, dtype, STATS),
        BACKWARD: functools.partial(_backward, R, V, dtype),
    }[kernel]


def _case(kernel: str, R: int, V: int, dtype: torch.dtype, launch: launches.Launch) -> Case:
    entry = (kernel, dtype.itemsize)
    config, name = f"{launch.block}x{launch.warps} s{launch.stages}", str(dtype).removeprefix("torch.")
    make, within = _maker(kernel, R, V, dtype), functools.partial(replaced, entry, launch)
    return Case("logits", kernel, name, R, V, 0, config, make, launches.ROWS[entry] == launch, within)


def _few_rows(kernel: str, R: int, V: int, dtype: torch.dtype, programs: int | None) -> Case:
    config = "as launched" if programs is None else f"{programs} programs a row"
    within = contextlib.nullcontext if programs is None else functools.partial(_shared, programs)
    name = str(dtype).removeprefix("torch.")
    return Case("few rows", kernel, name, R, V, 0, config, _maker(kernel, R, V, dtype), programs is None, within)


def cases(small: bool) -> Iterator[Case]:
    """Yield the variants, those of most value first; `small` ones for a machine without a GPU."""
    dtype = torch.float32 if small else torch.bfloat16
    sizes = (4,) if small else (8192, 512, 64)
    V, wide = (4096 + 37, 8192 + 5) if small else (128256, 262144)
    variants = [launches.Launch(block, warps, stages) for stages in STAGES for block, warps in BLOCKS]
    for R in sizes:
        for kernel in (FORWARD, BACKWARD, STATISTICS):
            current = launches.ROWS[kernel, dtype.itemsize]
            for launch in dict.fromkeys((current, *(variants[:2] if small else variants))):
                yield _case(kernel, R, V, dtype, launch)
    # Without a GPU, enough logits for two segments.
    shared = launches.SHORTEST_SEGMENT + 37 if small else V
    for R in (2,) if small else (64, 256):
        for kernel, programs in itertools.product((FORWARD, BACKWARD, STATISTICS), (None, 1, 4, 8)):
            yield _few_rows(kernel, R, shared, dtype, programs)
    for kernel in (FORWARD, BACKWARD, STATISTICS):
        for launch in dict.fromkeys((launches.ROWS[kernel, dtype.itemsize], *(variants[:1] if small else variants))):
            yield _case(kernel, sizes[0] // 2, wide, dtype, launch)

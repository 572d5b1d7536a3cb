"""Time calls by events and steps by the wall clock, and read the resources of a compiled kernel."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

WARM_UPS, LEAST, MOST = 5, 10, 200
ENOUGH = 0.03  # seconds of repeats
# Runtime calls after which the host waits for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def _wall(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def microseconds(run: Callable[[], object], device: str, whole: bool) -> list[float]:
    """Return the µs of each repeat: by events on a GPU, by the clock for a whole step and on a CPU."""
    if device == "cpu":
        return [1e6 * _wall(run, device) for _ in range(2)]
    for _ in range(WARM_UPS - 1):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    repeats = min(max(math.ceil(ENOUGH / taken), LEAST), MOST)
    if whole:
        return [1e6 * _wall(run, device) for _ in range(repeats)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    # The device sleeps until all repeats are queued, so that it never waits for Python between two events.
    torch.cuda._sleep(int(2e9 * min(2 * queued * repeats, 0.2)))
    for begin, end in zip(events[::2], events[1::2], strict=True):
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in zip(events[::2], events[1::2], strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def profiled(run: Callable[[], object]) -> dict[str, float]:
    """Return a step's launches, host waits, and the µs in which its GPU computes and in which it idles."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
    events = profile.events() or []
    kernels = [event.time_range for event in events if str(event.device_type).endswith("CUDA")]
    spans = sorted((span.start, span.end) for span in kernels)
    if not spans:
        raise RuntimeError("the profiler saw nothing on the device")
    # The profiler itself waits for the device once before it stops.
    waits = sum(event.name.startswith(WAITS) for event in events) - 1
    busy, end = 0.0, -math.inf
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    elapsed = end - spans[0][0]
    return {"launches": len(spans), "waits": waits, "busy_us": busy, "idle_us": elapsed - busy}


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """Yield a list that receives every Triton kernel that is launched inside."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    with mock.patch.object(JITFunction, "run", recording):
        yield kernels


def resources(kernel: Any) -> dict[str, int]:
    """Return the resources of a compiled kernel, and how many programs a multiprocessor of sm_90 or sm_100 holds.

    Registers are allocated to warps in units of 256. A multiprocessor has 65536 registers, 64 warps (2048 threads), 32
    programs, and 228 KiB of shared memory, of which each program takes 1 KiB in addition to its own.
    """
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    of_a_warp = -(-kernel.n_regs * 32 // 256) * 256
    limits = (65536 // max(of_a_warp * warps, 1), 64 // warps, 32, 228 * 1024 // (shared + 1024))
    return {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared": shared, "programs": min(limits)}

"""Compile Triton kernels for a device into Triton's cache, in several processes that do not open the device.

Compiling a kernel takes half a second of one core, so a benchmark of hundreds of kernels would spend its minutes on a
GPU compiling. The processes here launch the same kernels on small CPU tensors through a driver that only compiles. The
launch on the device then finds them in the cache.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress

import torch
from triton.backends.compiler import GPUTarget

Job = tuple[Callable[..., object], tuple[object, ...]]


def target_of(device: torch.device | str) -> GPUTarget:
    """Return the target that Triton compiles for on a CUDA or ROCm device."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return GPUTarget("hip", properties.gcnArchName.partition(":")[0], properties.warp_size)
    return GPUTarget("cuda", 10 * properties.major + properties.minor, 32)


def compile_kernels(target: GPUTarget, function: Callable[..., object], *arguments: object) -> int:
    """Call a function that launches kernels, compile these for `target`, and return their number.

    The kernels do not run, so the function may fail on their results. Such an error ends the call and is ignored.
    """
    from benchmarks import sass
    from benchmarks.triton_on_cpu import launchers_on_cpu

    with sass.compiling(target) as compiled, launchers_on_cpu(), suppress(Exception):
        function(*arguments)
    return len(compiled)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


@contextmanager
def compiling_ahead(
    target: GPUTarget, jobs: Sequence[Job], processes: int | None = None
) -> Iterator[list[Future[int]]]:
    """Compile the kernels of all jobs in the background, in order, and yield a future for each.

    Args:
        target: the device to compile for.
        jobs: picklable functions and their arguments; see `compile_kernels`.
        processes: the number of processes; None takes all cores but one.
    """
    processes = processes or max(1, len(os.sched_getaffinity(0)) - 1)
    # Forked processes could not use CUDA or OpenMP after their parent has.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(processes, max(len(jobs), 1)), context, initializer=_start)
    try:
        yield [pool.submit(compile_kernels, target, function, *arguments) for function, arguments in jobs]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # Do not wait for a kernel that takes a minute to compile and is no longer needed.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()

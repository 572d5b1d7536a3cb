"""Measure the peak memory of a call, as the operating system or the accelerator counts it."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes that a call uses beyond those in use before it, or None where they cannot be counted."""
    if device.type != "cuda" and not _counted(device):
        return None
    before = held(device)
    peak = restarted(device)
    run()
    return peak() - before


def _counted(device: torch.device) -> bool:
    return device.type == "cpu" and os.access(PROCESS / "clear_refs", os.W_OK)


def held(device: torch.device) -> int:
    """Return the bytes in use: those allocated on an accelerator, or those resident in this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    # Return freed memory to the system first: memory that the allocator reuses would not be counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def restarted(device: torch.device) -> Callable[[], int]:
    """Reset the high-water mark, and return a function that reads the most bytes in use since then."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

        def peak() -> int:
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device)

        return peak
    (PROCESS / "clear_refs").write_text("5")
    return lambda: _status("VmHWM")


def _status(field: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

"""How much memory a call has at most, as the operating system or the accelerator counts it."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call has at most beyond what is there before it; None where nothing counts them."""
    if device.type != "cuda" and not _counted(device):
        return None
    before = held(device)
    peak = restarted(device)
    run()
    return peak() - before


def _counted(device: torch.device) -> bool:
    return device.type == "cpu" and os.access(PROCESS / "clear_refs", os.W_OK)


def held(device: torch.device) -> int:
    """Bytes that are in use: allocated on an accelerator, resident in this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    # What was freed is given back first: used again, it would not be counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def restarted(device: torch.device) -> Callable[[], int]:
    """Let the high-water mark start again; what is returned reads the most bytes in use since."""
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

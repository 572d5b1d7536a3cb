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
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not os.access(PROCESS / "clear_refs", os.W_OK):
        return None
    # Freed memory that the process still holds would be used again without being counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _resident("VmRSS")
    (PROCESS / "clear_refs").write_text("5")  # the high-water mark starts again from what is resident
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

"""A context in which waiting for a CUDA device is an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise where the host waits for the device. The mode is put back, whatever happens."""
    try:
        with warnings.catch_warnings():
            # PyTorch says so once in a process, and a warning is an error here.
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

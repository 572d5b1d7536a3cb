"""A context in which waiting for a CUDA device is an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise where the host waits for the device, and put the mode back, whatever happens."""
    try:
        with warnings.catch_warnings():
            # PyTorch warns once in a process that the mode is a prototype, and a warning is an error here.
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

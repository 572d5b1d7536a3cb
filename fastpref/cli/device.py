"""Test whether a device still works."""

from __future__ import annotations

import torch


def works(device: torch.device | str) -> bool:
    """Return whether a device still runs kernels; after some errors it fails for the rest of the process."""
    where = torch.device(device)
    if where.type == "cpu":
        return True
    try:
        torch.get_device_module(where).synchronize()
        return bool((torch.ones(2, device=where) == 1).all())
    except Exception:
        return False

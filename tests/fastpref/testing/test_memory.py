"""Tests of the measurement of a call's peak memory."""

from __future__ import annotations

import os

import pytest
import torch

from fastpref.testing.memory import peak_bytes


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts it")
def test_memory_is_what_a_call_needs_and_not_what_was_freed_before_it() -> None:
    cpu = torch.device("cpu")
    torch.ones(2**26).sum()  # 256 MiB, freed
    # 1 MiB each: small enough to stay with the allocator when freed.
    held = [torch.ones(2**18) for _ in range(64)]
    del held
    peak = peak_bytes(lambda: [torch.ones(2**18) for _ in range(32)], cpu)
    assert peak == pytest.approx(2**25, abs=2**23)
    nothing = peak_bytes(lambda: None, cpu)
    assert nothing is not None
    assert nothing < 2**22

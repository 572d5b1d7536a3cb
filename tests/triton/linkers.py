"""What Triton needs beside itself to compile for AMD."""

from __future__ import annotations

import os

import pytest
import triton

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
LINKERS = (os.environ.get("TRITON_HIP_LLD_PATH", ""), "/opt/rocm/llvm/bin/ld.lld")


def skip_without_linker(target: str) -> None:
    """Skip a test whose target an old Triton cannot link for on this machine."""
    if target.startswith("gfx") and TRITON < (3, 6) and not any(map(os.path.exists, LINKERS)):
        pytest.skip("Triton 3.4 links AMD's code by the ld.lld of ROCm, which is not installed")

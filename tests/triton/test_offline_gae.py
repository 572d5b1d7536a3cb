"""The advantages' kernel compiled, not run, for the GPUs it is meant for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import sass
from fastpref_kernels.triton import gae
from tests.triton.linkers import skip_without_linker

TARGETS = tuple(sass.TARGETS)


def compiled(target: str, T: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    skip_without_linker(target)
    rewards = torch.zeros(4, T, dtype=dtype)
    with sass.compiling(target) as kernels:
        gae.gae(rewards, torch.zeros_like(rewards), rewards == 0, 1.0, 0.95)
    return kernels


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_launch_that_does_not_spill(dtype: torch.dtype, target: str) -> None:
    (kernel,) = compiled(target, 2048, dtype)
    program = sass.read(kernel, target)
    assert (program.spills, program.stack) == (0, 0)


def test_another_length_is_no_other_kernel() -> None:
    found = {id(kernel) for T in (1, 16, 1000, 2048) for kernel in compiled("sm_90", T)}
    assert len(found) == 1

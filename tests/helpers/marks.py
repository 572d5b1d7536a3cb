"""Parametrizations that several test files share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastpref
from fastpref import reference
from tests.tolerance import DTYPES

# The C++ operators, and the PyTorch ones that stand in where there is no compiler.
both = pytest.mark.usefixtures("implementation")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
wide_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
packages = pytest.mark.parametrize("package", [fastpref, reference], ids=["fastpref", "reference"])


def examples(count: int) -> Any:
    """Run a hypothesis test on `count` examples, the same in every run.

    Fixtures that hold for a whole test, such as poisoned memory, last from one example to the next.
    """
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )

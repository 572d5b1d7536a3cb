"""Numbers that are worked out by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

THIRD = math.log(1 / 3)
WIN = math.log(math.e / (math.e + 1))  # log σ(1)


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(value: Tensor, *wanted: float) -> None:
    torch.testing.assert_close(value.reshape(-1), tensor(*wanted), rtol=1e-14, atol=1e-14)

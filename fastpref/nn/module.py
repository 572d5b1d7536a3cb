"""The base class of the loss modules."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastpref._core.checks import describe


class Loss(nn.Module):
    """A loss with its options fixed."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{name} must not be a tensor at construction, but at the call; got {describe(value)}")
        self.options = options

    def extra_repr(self) -> str:
        """Return the options that differ from their defaults."""
        defaults = inspect.signature(type(self)).parameters
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v != defaults[k].default)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without elements: a constructor computes its loss, so that the function checks the options."""
    return torch.empty(0, *shape, dtype=dtype, device="cpu")

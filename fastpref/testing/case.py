"""The type of a case, and the constants, layouts and random arguments that cases share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Eager's error is a maximum over rows: with enough rows it hardly depends on the seed.
ROWS, FEW_ROWS, VOCABULARY, LARGE_VOCABULARY = (4, 9), (2, 4), 1031, 50257
TRANSFORM: dict[str, Any] = {"temperature": 1.3, "logit_scale": 0.6, "softcap": 4.0}

# The arguments that have gradients, and all other arguments, both by name.
Arguments = tuple[dict[str, Tensor], dict[str, Any]]
Draw = Callable[[torch.Generator], Arguments]
Layout = Callable[[Tensor], Tensor]


def as_it_is(leaf: Tensor) -> Tensor:
    """Return the tensor itself."""
    return leaf


def transposed_rows(leaf: Tensor) -> Tensor:
    """Return the same values with the first two dimensions exchanged in memory."""
    return leaf.transpose(0, 1).contiguous().transpose(0, 1)


def everywhere(device: torch.device) -> bool:
    """Return True, for a case that runs on every device."""
    return True


def nothing_cancels(leaves: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, float]:
    """Return no magnitudes, for a case without sums that cancel."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to judge.

    Attributes:
        name: "function/description of the call".
        function: the function to judge.
        definition: the same function in plain PyTorch.
        draw: draws the arguments from a generator; floating-point ones are float64.
        layout: changes the memory layout of each argument that has a gradient.
        dtypes: the dtypes to judge the call in.
        runs_on: tells whether a device supports the call.
        summed: returns, by the name of a result, the magnitude of the terms of a sum that cancels.
        within: returns the context to make the call in on a device.
        slack: a factor on the allowance in float64, where the error of eager PyTorch is not visible.
    """

    name: str
    function: Callable[..., Any]
    definition: Callable[..., Any]
    draw: Draw
    layout: Layout = as_it_is
    dtypes: tuple[torch.dtype, ...] = DTYPES
    runs_on: Callable[[torch.device], bool] = everywhere
    summed: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, float]] = nothing_cancels
    within: Callable[[torch.device], AbstractContextManager[Any]] = nullcontext
    slack: float = 1.0

    @property
    def row(self) -> str:
        """Return the name of the function, with the loss type if it has several."""
        return self.name.partition("/")[0]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw float64 standard normal numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_labels(generator: torch.Generator, vocabulary: int, *rows: int) -> Tensor:
    """Draw labels: about three tenths are ignored, and the last two of a row are 0 and `vocabulary - 1`."""
    labels = torch.randint(vocabulary, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    labels[..., -2], labels[..., -1] = 0, vocabulary - 1
    return labels


def boundaries(tokens: int) -> Tensor:
    """Return the boundaries of four packed sequences of unequal lengths, one of them empty."""
    return torch.tensor([0, tokens // 4, tokens // 4, tokens // 2 + 1, tokens])

"""A call that is checked, and what the arguments of many are made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Rows enough that eager's error, the largest of them all, is not a matter of luck.
ROWS, FEW_ROWS, VOCABULARY, LARGE_VOCABULARY = (4, 9), (2, 4), 1031, 50257
TRANSFORM: dict[str, Any] = {"temperature": 1.3, "logit_scale": 0.6, "softcap": 4.0}

# What it is differentiated by, and every other argument, by name.
Arguments = tuple[dict[str, Tensor], dict[str, Any]]
Draw = Callable[[torch.Generator], Arguments]
Layout = Callable[[Tensor], Tensor]


def as_it_is(leaf: Tensor) -> Tensor:
    """The layout of most."""
    return leaf


def transposed_rows(leaf: Tensor) -> Tensor:
    """Return the same values with the first two dimensions exchanged in memory."""
    return leaf.transpose(0, 1).contiguous().transpose(0, 1)


def everywhere(device: torch.device) -> bool:
    """The `runs_on` of most."""
    return True


def nothing_cancels(leaves: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, float]:
    """The `summed` of most."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a public function.

    Attributes:
        name: "function/what is particular about the call".
        function: what is judged.
        definition: the same in plain PyTorch.
        draw: from a seed, the arguments, float64 where they are floating point.
        layout: what the function is given in place of each that it is differentiated by.
        dtypes: those that it is judged in.
        runs_on: from a device, whether it has what is judged.
        summed: from the arguments, by the name of a result, the magnitude of terms that cancel in it.
        within: from the device, the context that it is called in.
        slack: multiplies what may be lost in float64, where what eager loses beside ours cannot be seen.
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
        """The function, and the loss where it has several."""
        return self.name.partition("/")[0]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_labels(generator: torch.Generator, vocabulary: int, *rows: int) -> Tensor:
    """Labels of which three tenths are ignored, with both ends of the vocabulary among the rest."""
    labels = torch.randint(vocabulary, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    labels[..., -2], labels[..., -1] = 0, vocabulary - 1
    return labels


def boundaries(tokens: int) -> Tensor:
    """Four packed sequences of unequal lengths, one of them empty."""
    return torch.tensor([0, tokens // 4, tokens // 4, tokens // 2 + 1, tokens])

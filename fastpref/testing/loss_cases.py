"""Cases for every row of `fastpref.losses.TABLE` and `fastpref.losses.RLHF`, each with its example call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

import torch

from fastpref import losses
from fastpref.reference.losses import rlhf
from fastpref.testing.case import Arguments, Case

BATCH = 37


def loss_cases() -> Iterator[Case]:
    """Yield a case for every row and reduction; the losses of `TABLE` are judged for "mean" and "none" only."""
    for entry in (*losses.TABLE, *losses.RLHF):
        if isinstance(entry, losses.Loss):
            reductions = ("mean", "none")
        elif "reduction" in inspect.signature(entry.reference).parameters:
            reductions = rlhf.REDUCTIONS
        else:
            reductions = (None,)
        for reduction in reductions:
            yield loss_case(entry, reduction)


def loss_case(entry: losses.Entry, reduction: str | None, batch: int = BATCH) -> Case:
    """Return the case of a row's example call with `batch` elements."""
    return Case(
        name=entry.name if reduction is None else f"{entry.name}/{reduction}",
        function=entry.function,
        definition=entry.reference,
        draw=functools.partial(_draw, entry, reduction, batch),
    )


def _draw(entry: losses.Entry, reduction: str | None, batch: int, generator: torch.Generator) -> Arguments:
    tensors, options = entry.example(generator, batch)
    named = dict(zip(inspect.signature(entry.reference).parameters, tensors, strict=False))
    leaves = {name: value for name, value in named.items() if value.is_floating_point()}
    constants = {name: value for name, value in named.items() if name not in leaves} | options
    if isinstance(entry, losses.Loss):
        constants |= entry.options
    return leaves, constants if reduction is None else {**constants, "reduction": reduction}

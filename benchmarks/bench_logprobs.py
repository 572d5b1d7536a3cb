"""Log-probs from logits, forward and backward: ours, the peers, and the copy of the logits that is the floor.

    python benchmarks/bench_logprobs.py            # the table of the README, under both allocators
    pytest benchmarks/bench_logprobs.py            # the same rows for pytest-benchmark, under the allocator it started with

Every row is held against float64 before it is timed. Rounds go over all rows in turn, each round from another one, so
that a drift of the machine's speed reaches all of them alike.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

import fastpref
from benchmarks import peers
from benchmarks.peers import Entry

B, T, V = 8, 128, 50304
GPU_B, GPU_T, GPU_V = 8, 1024, 128256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOCATORS = {"default": {}, "THP": {"THP_MEM_ALLOC_ENABLE": "1"}}
MIB = 2**20


def _ours(in_place: bool) -> peers.Function:
    return lambda logits, labels: fastpref.token_logprobs(logits, labels, shift=False, inplace_backward=in_place)


FRESH = Entry("fastpref", lambda: _ours(False))
IN_PLACE = Entry("fastpref, in place", lambda: _ours(True), in_place=True)
CPU = (FRESH, IN_PLACE, *peers.CPU)
GPU = (FRESH, IN_PLACE, *peers.GPU)


class _Model(torch.autograd.Function):
    """Logits as a model gives them: no leaf, and their gradient goes to `received`, or is dropped."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor, received: list[Tensor] | None) -> Tensor:
        ctx.received = received
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.received is not None:
            ctx.received.append(grads[0])
        return grads[0].new_zeros((), dtype=torch.float32), None, None


def forward_backward(
    function: peers.Function, logits: Tensor, labels: Tensor, received: list[Tensor] | None = None
) -> Tensor:
    """One step: log-probs, and the gradient of their sum."""
    parameter = torch.zeros((), device=logits.device, requires_grad=True)
    logps = function(_Model.apply(parameter, logits, received), labels)  # type: ignore[arg-type]
    logps.backward(torch.ones_like(logps))
    return logps.detach()


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) as a trained model's spread, labels (B, T), all of them scored."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape, dtype=dtype, device=device).normal_(0, 3, generator=generator)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator, device=device)


@dataclass(frozen=True)
class Truth:
    """The float64 answer: log-probs (B, T), their gradient (B, T, V)."""

    logps: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Truth:
        """A sequence at a time: float64 is wide."""
        logps, gradient = torch.empty(labels.shape, dtype=torch.float64, device=logits.device), []
        for b, (z, y) in enumerate(zip(logits, labels, strict=True)):
            leaf = z.double().requires_grad_()
            logps[b] = fastpref.reference.token_logprobs(leaf, y, shift=False)
            gradient += torch.autograd.grad(logps[b].sum(), leaf)
            logps = logps.detach()
        return cls(logps, torch.stack(gradient))


def check(entry: Entry, function: peers.Function, logits: Tensor, labels: Tensor, truth: Truth) -> dict[str, float]:
    """The largest errors of log-probs and gradient; raises where one is above 4 ulp of the logits' dtype."""
    received: list[Tensor] = []
    given = logits.clone() if entry.in_place else logits
    logps = forward_backward(function, given, labels, received)
    wanted = truth.logps if logps.dim() else truth.logps.sum()
    pairs = {"log-probs": (logps, wanted), "gradient": (received[0], truth.gradient)}
    errors = {}
    for name, (found, right) in pairs.items():
        errors[name] = max((f.double() - r).abs().max().item() for f, r in zip(found.view(-1, *found.shape[-1:] if found.dim() > 2 else ()), right.view(-1, *right.shape[-1:] if right.dim() > 2 else ()), strict=True))
        limit = 4 * torch.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(right.abs().max().item()))
        if not errors[name] <= limit:
            raise AssertionError(f"{entry.name}: {name} are off by {errors[name]:.2e}, more than {limit:.2e}")
    return errors

"""Functions that kernels of losses and their launchers share: log σ and σ, the sum over programs, and the launch.

A program takes a tile of elements. The program that finishes last sums the losses, in the order of the programs, so two
runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.triton.common import accumulator, exp, log1p
from fastpref_kernels.triton.launch import launch

# Programs whose losses are summed at a time.
SUM_BLOCK: tl.constexpr = tl.constexpr(128)


@triton.jit
def log_sigmoid(x, ACC: tl.constexpr):
    """Return log σ(x), to its last digits far from 0 too."""
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x), ACC))


@triton.jit
def sigmoid(x, ACC: tl.constexpr):
    """Return σ(x), from the exponential that does not overflow."""
    e = exp(-tl.abs(x), ACC)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def finish(losses, total, scratch, ticket, loss, index, inside, N, SUMMED: tl.constexpr, MEAN: tl.constexpr):
    """Store each element's loss, or have the last program store their sum or mean."""
    if SUMMED:
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        last = True
        if scratch is not None:
            tl.store(scratch + program, total)
            tl.debug_barrier()
            last = tl.atomic_add(ticket, 1) == programs - 1
            if last:
                acc = tl.zeros((SUM_BLOCK,), total.dtype)
                for start in range(0, programs, SUM_BLOCK):
                    i = start + tl.arange(0, SUM_BLOCK)
                    acc += tl.load(scratch + i, mask=i < programs, other=0.0, volatile=True)
                total = tl.sum(acc)
        if last:
            if MEAN:
                total = total / N
            tl.store(loss, total)
    else:
        tl.store(loss + index, losses, mask=inside)


def outputs(reduction: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return uninitialized memory for the loss of these tensors, and for the partial derivatives by each of them.

    Args:
        reduction: "mean", "sum" or "none". A sum or mean over nothing is 0, and no program would write it.
        tensors: tensors (N,) or one tensor (N, K), on one device.

    Returns:
        The loss, () or (N,), and the partial derivatives, (n, N) by n tensors (N,) or (N, K).
    """
    given = [tensor for tensor in tensors if tensor is not None]
    first, dtype = given[0], widest(given)
    shape = first.shape
    if reduction == "none":
        loss = first.new_empty(shape[:1], dtype=dtype)
    else:
        loss = first.new_empty((), dtype=dtype) if shape[0] else first.new_zeros((), dtype=dtype)
    return loss, loss.new_empty(shape if len(shape) == 2 else (len(given), shape[0]))


def launch_loss(
    kernel: Any,
    elements: int,
    per_program: int,
    loss: Tensor,
    reduction: str,
    tensors: Sequence[Any],
    scalars: Sequence[Any],
    *,
    warps: int,
    ticket: Tensor | None = None,
    **constants: Any,
) -> None:
    """Launch as many programs as the elements need.

    If there are several, they share their sums through scratch memory and a ticket that starts at 0.

    Args:
        kernel: takes `tensors`, the scratch memory, the ticket and `scalars`.
        elements: number of elements.
        per_program: elements of a program.
        loss: the loss to write, () or (N,).
        reduction: "mean", "sum" or "none".
        tensors: tensors of the kernel, or None.
        scalars: numbers of the kernel.
        warps: warps of a program.
        ticket: (1,), a ticket that is 0 before the launch; None for a fresh one.
        constants: more constants of the kernel.
    """
    if elements == 0:
        return
    programs = (elements + per_program - 1) // per_program
    scratch = None
    if programs > 1 and reduction != "none":
        scratch = loss.new_empty(programs)
        ticket = loss.new_zeros(1, dtype=torch.int32) if ticket is None else ticket
    launch(
        kernel,
        programs,
        *(*tensors, scratch, ticket, *scalars),
        SUMMED=reduction != "none",
        MEAN=reduction == "mean",
        ACC=accumulator(loss.dtype),
        **constants,
        num_warps=warps,
        enable_fp_fusion=True,
    )


def widest(tensors: list[Tensor]) -> torch.dtype:
    """Return the dtype that a loss of these is computed in: their common dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype

"""What every loss's kernel needs: log σ and σ, the sum over programs, and the launch.

A program takes a tile of elements; the losses are summed by whichever program finishes last, in the order of the
programs, so two runs agree bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.linear import widened
from fastpref_kernels.triton.common import accumulator, exp, log1p, on_device

# Programs whose losses are summed at a time.
SUM_BLOCK: tl.constexpr = tl.constexpr(128)


@triton.jit
def log_sigmoid(x, ACC: tl.constexpr):
    """log σ(x), to its last digits far from 0."""
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x), ACC))


@triton.jit
def sigmoid(x, ACC: tl.constexpr):
    """σ(x), from the exponential that does not overflow."""
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


def outputs(first: Tensor, dtype: torch.dtype, columns: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Empty loss and partial derivatives; a sum or mean over nothing is 0, and no program would write it."""
    N = first.shape[0]
    shape = (N,) if reduction == "none" else ()
    loss = first.new_empty(shape, dtype=dtype) if N else first.new_zeros(shape, dtype=dtype)
    return loss, first.new_empty((N, columns), dtype=dtype)


def launch(kernel: Any, programs: int, loss: Tensor, reduction: str, tensors: list[Any], scalars: list[Any],
            warps: int, ticket: Tensor | None = None, **constants: Any) -> None:  # fmt: skip
    """Launch over `programs` tiles; only several of them need a place to meet, and a counter at 0 if none is given."""
    if programs == 0:
        return
    scratch = None
    if programs > 1 and reduction != "none":
        scratch = loss.new_empty(programs)
        ticket = loss.new_zeros(1, dtype=torch.int32) if ticket is None else ticket
    acc = accumulator(loss.dtype)
    with on_device(loss.device):
        kernel[(programs,)](
            *tensors, scratch, ticket, *scalars, SUMMED=reduction != "none", MEAN=reduction == "mean", ACC=acc,
            **constants, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def widest(*tensors: Tensor | None) -> torch.dtype:
    """What a loss of these is computed in."""
    return widened(*(tensor.dtype for tensor in tensors if tensor is not None))

"""Launch the kernels of log-probs from logits: the log-probs of labels, and the gradient of logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels.contract import STATISTICS, Statistic, Transform, empty_statistics
from fastpref_kernels.triton import launches
from fastpref_kernels.triton.common import accumulator, alignment, dense, split
from fastpref_kernels.triton.launch import launch
from fastpref_kernels.triton.logprobs_backward import logprobs_backward_kernel
from fastpref_kernels.triton.logprobs_finish import SEGMENTS, numbers
from fastpref_kernels.triton.logprobs_forward import logprobs_forward_kernel

# The kernel of each launch of a forward.
FORWARDS: dict[str, Any] = {
    "logprobs_forward": logprobs_forward_kernel,
    "logprobs_statistics": logprobs_forward_kernel,
}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


@cache
def _multiprocessors(device: torch.device) -> int:
    """Return the number of a device's multiprocessors; 1 for the CPU that the interpreter runs on."""
    if device.type == "cpu":
        return 1
    properties = getattr(torch, device.type).get_device_properties(device)
    # Intel calls them subslices.
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def logprobs(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    reduction: str,
    stats: int,
) -> tuple[Tensor, ...]:
    """Run `fastpref::logprobs`."""
    B, T, V = logits.shape
    rows = max(T - shift, 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    reduced = n_sequences if reduction != "none" else 0
    logps = logits.new_empty((B, rows), dtype=dtype)
    norm = logits.new_empty((4 if stats & Statistic.ENTROPY else 3, B, rows), dtype=dtype)
    # A sequence without tokens has no program that would write its sum.
    fresh = logits.new_zeros if cu_seqlens is not None or rows == 0 else logits.new_empty
    sequences = fresh((reduced,), dtype=dtype)
    counts = fresh((reduced,), dtype=torch.int32)
    tickets = logits.new_zeros((reduced,), dtype=torch.int32)
    statistics = empty_statistics(logits, STATISTICS, stats, (B, rows), dtype)
    results = (logps, sequences, norm, counts, *statistics)
    if B * rows == 0:
        return results
    name = "logprobs_forward" if stats <= Statistic.LSE else "logprobs_statistics"
    wide = logits.stride(2) != 1
    cut = launches.forward_launch(
        name, logits.element_size(), B * rows, V, wide=wide, multiprocessors=_multiprocessors(logits.device)
    )
    partials = logps.new_empty((B, rows, numbers(stats), SEGMENTS.value))
    row_tickets = tickets if cut.programs == 1 else logits.new_zeros((B, rows), dtype=torch.int32)
    tensors = (logits, labels, *dense(cu_seqlens, weights), logps, norm, sequences, counts, tickets)
    sizes = (V, rows, n_sequences, B * rows, cut.segment_blocks, cut.programs, *logits.stride(), *labels.stride())
    rate, inner, cap, _ = Transform.of(logit_scale, temperature, softcap)
    launch(
        FORWARDS[name],
        B * rows * cut.programs,
        *(*tensors, partials, row_tickets, *statistics, *sizes, ignore_index),
        *split(rate, inner, 1.0 if cap is None else cap),
        SHIFT=int(shift),
        PACKED=cu_seqlens is not None,
        WEIGHTED=weights is not None,
        REDUCTION=REDUCTIONS[reduction],
        STATS=stats,
        CAP=cap is not None,
        ACC=accumulator(logits.dtype),
        ALIGN=alignment(logits, *logits.stride()[:2]),
        WIDE=wide,
        BLOCK=cut.block,
        STAGES=cut.stages,
        NUMBERS=numbers(stats),
        num_warps=cut.warps,
        enable_fp_fusion=True,
    )
    return results


def logprobs_backward(
    out: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    weights: Tensor | None,
    norm: Tensor,
    counts: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    reduction: str,
) -> None:
    """Write the gradient of logits to `out`, which may be the logits themselves."""
    B, T, V = logits.shape
    if B * T == 0:
        return
    rows = max(T - shift, 0)
    n_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    block, warps, stages = launches.ROWS["logprobs_backward", logits.element_size()]
    programs = launches.row_programs(B * T, -(-V // block), _multiprocessors(logits.device))
    tensors = (*dense(grad, grad_entropy), logits, labels, *dense(cu_seqlens, weights, norm, counts))
    strides = (*out.stride(), *logits.stride(), *labels.stride())
    rate, inner, cap, slope = Transform.of(logit_scale, temperature, softcap)
    launch(
        logprobs_backward_kernel,
        B * T * programs,
        *(out, *tensors, V, T, rows, n_sequences, B * rows, programs, *strides, ignore_index),
        *split(rate, inner, 1.0 if cap is None else cap, slope),
        SHIFT=int(shift),
        PACKED=cu_seqlens is not None,
        WEIGHTED=weights is not None,
        REDUCTION=REDUCTIONS[reduction],
        GRAD=grad is not None,
        GRAD_ENTROPY=grad_entropy is not None,
        CAP=cap is not None,
        ACC=accumulator(logits.dtype),
        ALIGN=alignment(logits, *logits.stride()[:2]),
        OUT_ALIGN=alignment(out, *out.stride()[:2]),
        WIDE=logits.stride(2) != 1 or out.stride(2) != 1,
        BLOCK=block,
        STAGES=stages,
        num_warps=warps,
        enable_fp_fusion=True,
    )

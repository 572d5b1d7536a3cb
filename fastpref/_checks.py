"""Argument checks shared by every public function and its reference.

Shapes, dtypes and devices are checked here, in Python, where an error can name the argument. Values that live in a
tensor (a label's range, the boundaries of packed sequences) are checked inside the operators, because reading them here
would synchronise a GPU and break `torch.compile`'s graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)
REDUCTIONS = ("none", "sum", "mean")


def describe(value: object) -> str:
    """One phrase for an error message: a tensor's shape, dtype and device, or the value's repr."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype], wanted: str) -> None:
    """Raise `TypeError` unless `value` is a tensor of one of `dtypes`."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise TypeError(f"{name} must be {wanted}; got {describe(value)}")


def check_same_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Raise `ValueError` unless both tensors are on one device."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device, {like.device}; got {describe(value)}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a finite number above zero."""
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")


def check_logits(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check what `token_logprobs` and `sequence_logprobs` are given.

    Args:
        logits: (B, T, V) or (N, V), any strides, fp16, bf16, fp32 or fp64.
        labels: int64 or int32, of logits' shape without V. Packed logits (1, N, V) also take labels (N,).
        cu_seqlens: None, or (S+1,) int32 or int64.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.
    """
    check_tensor("logits", logits, FLOATING, "a fp16, bf16, fp32 or fp64 tensor (B, T, V) or (N, V)")
    check_tensor("labels", labels, INTEGER, "an int64 or int32 tensor of logits' shape without V")
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must be (B, T, V) or (N, V); got {describe(logits)}")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one vocabulary entry, V > 0; got {describe(logits)}")
    packed = cu_seqlens is not None and logits.dim() == 3 and labels.dim() == 1
    if labels.shape != (logits.shape[1:2] if packed and logits.shape[0] == 1 else logits.shape[:-1]):
        raise ValueError(
            f"labels must have logits' shape without V, {tuple(logits.shape[:-1])} "
            f"(aligned with input_ids: the shift is made inside); got {describe(labels)}"
        )
    check_same_device("labels", labels, "logits", logits)
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, INTEGER, "an int32 or int64 tensor (S+1,)")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must be (S+1,), starting at 0; got {describe(cu_seqlens)}")
        if logits.dim() == 3 and logits.shape[0] != 1:
            raise ValueError(f"with cu_seqlens, logits must be packed, (N, V) or (1, N, V); got {describe(logits)}")
        check_same_device("cu_seqlens", cu_seqlens, "logits", logits)


def check_transform(temperature: float, logit_scale: float, softcap: float | None) -> None:
    """Check the three scalars of z ← softcap·tanh(z·logit_scale/softcap)/temperature."""
    check_positive("temperature", temperature)
    check_positive("logit_scale", logit_scale)
    if softcap is not None:
        check_positive("softcap", softcap)


def check_ld(ld_alpha: float | None, shared_lengths: Tensor | None) -> None:
    """Check LD-DPO's two arguments."""
    if shared_lengths is None:
        return
    check_tensor("shared_lengths", shared_lengths, INTEGER, "an int64 or int32 tensor, one length a sequence")
    if ld_alpha is None:
        raise ValueError(f"shared_lengths is LD-DPO's and needs ld_alpha; got {describe(shared_lengths)} and no alpha")


def check_labels(targets: Tensor, scored: Tensor, vocabulary: int) -> None:
    """Raise `IndexError`, naming the first position, where a scored target is not in [0, vocabulary). Reads values."""
    bad = scored & ((targets < 0) | (targets >= vocabulary))
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"label {int(targets[position])} at scored position {list(position)} is outside "
            f"[0, {vocabulary}) and is not ignore_index"
        )


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise `ValueError` unless `cu_seqlens` rises from 0 to `tokens`. Reads values."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {bounds}")

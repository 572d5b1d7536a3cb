"""Argument checks shared by every public function and its reference.

Shapes, dtypes and devices are checked here, in Python, where an error can name the argument. Values that live in a
tensor (a label's range, the boundaries of packed sequences) are checked inside the operators, because reading them here
would synchronise a GPU and break `torch.compile`'s graph.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)
REDUCTIONS = ("none", "sum", "mean")
MODES = ("auto", "save", "recompute")


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
    if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")


def check_finite(name: str, value: object, *, least: float = -math.inf) -> None:
    """Raise `ValueError` unless `value` is a finite number, not below `least`."""
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    if not least <= number < math.inf or number == -math.inf:
        bound = "" if least == -math.inf else f", not below {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}; got {value!r}")


def _check_positions(
    name: str, values: Tensor, axis: str, entry: str, labels: Tensor, cu_seqlens: Tensor | None, sharded: bool = False
) -> None:
    """Check `values`, (B, T, axis) or (N, axis), and the labels and boundaries of its positions."""
    check_tensor(name, values, FLOATING, f"a fp16, bf16, fp32 or fp64 tensor (B, T, {axis}) or (N, {axis})")
    check_tensor("labels", labels, INTEGER, f"an int64 or int32 tensor of {name}'s shape without {axis}")
    if values.is_nested:
        raise ValueError(
            f"{name} must be no nested tensor: pass its values, (N, {axis}), and its offsets as cu_seqlens of "
            f"the functions of sequences; got {describe(values)}"
        )
    if values.dim() not in (2, 3):
        raise ValueError(f"{name} must be (B, T, {axis}) or (N, {axis}); got {describe(values)}")
    if values.shape[-1] == 0 and not sharded:
        raise ValueError(f"{name} must have at least one {entry}, {axis} > 0; got {describe(values)}")
    packed = cu_seqlens is not None and values.dim() == 3 and labels.dim() == 1
    if labels.shape != (values.shape[1:2] if packed and values.shape[0] == 1 else values.shape[:-1]):
        raise ValueError(
            f"labels must have {name}'s shape without {axis}, {tuple(values.shape[:-1])} "
            f"(aligned with input_ids: the shift is made inside); got {describe(labels)}"
        )
    check_same_device("labels", labels, name, values)
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, INTEGER, "an int32 or int64 tensor (S+1,)")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must be (S+1,), starting at 0; got {describe(cu_seqlens)}")
        if values.dim() == 3 and values.shape[0] != 1:
            raise ValueError(
                f"with cu_seqlens, {name} must be packed, (N, {axis}) or (1, N, {axis}); got {describe(values)}"
            )
        check_same_device("cu_seqlens", cu_seqlens, name, values)
        # Of the values' checks the one that needs none: no position is of a sequence there.
        if cu_seqlens.shape[0] == 1 and labels.shape[-1] > 0:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {labels.shape[-1]}; got {describe(cu_seqlens)}"
            )


def check_logits(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, *, sharded: bool = False) -> None:
    """Check what `token_logprobs` and `sequence_logprobs` are given.

    Args:
        logits: (B, T, V) or (N, V), any strides, fp16, bf16, fp32 or fp64.
        labels: int64 or int32, of logits' shape without V. Packed logits (1, N, V) also take labels (N,).
        cu_seqlens: None, or (S+1,) int32 or int64.
        sharded: the logits are a rank's part of the vocabulary, which may be none of it.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.
    """
    _check_positions("logits", logits, "V", "vocabulary entry", labels, cu_seqlens, sharded)


def check_transform(temperature: float, logit_scale: float, softcap: float | None) -> None:
    """Check the three scalars of z ← softcap·tanh(z·logit_scale/softcap)/temperature."""
    check_positive("temperature", temperature)
    check_positive("logit_scale", logit_scale)
    if softcap is not None:
        check_positive("softcap", softcap)


def check_ld(ld_alpha: float | None, shared_lengths: Tensor | None) -> None:
    """Check LD-DPO's two arguments."""
    if ld_alpha is not None:
        check_finite("ld_alpha", ld_alpha)
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


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of `device`."""
    # Not torch.amp.is_autocast_available, which Dynamo cannot trace before torch 2.12. Of the devices where fastpref
    # runs, meta alone has no autocast.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, *,
    prefix: str = "", sharded: bool = False,
) -> None:  # fmt: skip
    """Check what `linear_token_logprobs` and `linear_sequence_logprobs` are given.

    Args:
        hidden: (B, T, H) or (N, H), any strides, fp16, bf16, fp32 or fp64.
        weight: (V, H), of hidden's dtype. Under autocast, which casts them, the dtypes may differ unless one is fp64.
        labels: int64 or int32, of hidden's shape without H. Packed hidden states (1, N, H) also take labels (N,).
        bias: None, or (V,), of hidden's dtype.
        cu_seqlens: None, or (S+1,) int32 or int64.
        prefix: what the caller's names of hidden, weight and bias begin with.
        sharded: the weight is a rank's part of the vocabulary, which may be none of it.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.
    """
    of = f"{prefix}hidden"
    _check_positions(of, hidden, "H", "feature", labels, cu_seqlens)
    check_tensor(f"{prefix}weight", weight, FLOATING, f"a floating-point tensor (V, H) of {of}'s dtype")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        elsewhere = hasattr(weight, "ds_id") or weight.dim() == 1
        hint = ". ZeRO-3 and FSDP gather it within the wrapped module's forward: score there (fastpref.attach)"
        raise ValueError(
            f"{prefix}weight must be (V, H) with {of}'s H, {hidden.shape[-1]}; got {describe(weight)}"
            f"{hint if elsewhere else ''}"
        )
    if weight.shape[0] == 0 and not sharded:
        raise ValueError(f"{prefix}weight must have at least one vocabulary entry, V > 0; got {describe(weight)}")
    parameters = {f"{prefix}weight": weight}
    if bias is not None:
        check_tensor(f"{prefix}bias", bias, FLOATING, f"a floating-point tensor (V,) of {of}'s dtype")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias must be (V,), one a row of weight, {weight.shape[0]}; got {describe(bias)}")
        parameters[f"{prefix}bias"] = bias
    dtypes = {hidden.dtype, *(value.dtype for value in parameters.values())}
    cast = autocasts(hidden.device) and torch.float64 not in dtypes
    for name, value in parameters.items():
        check_same_device(name, value, of, hidden)
        if value.dtype != hidden.dtype and not cast:
            raise TypeError(f"{name} must have {of}'s dtype, {hidden.dtype}; got {describe(value)}")


def check_mode(mode: str, chunk_rows: int | None, filter_eps: float | None) -> None:
    """Check what says how, and not what, a `linear_*` function computes."""
    check_choice("mode", mode, MODES)
    if chunk_rows is not None:
        if not isinstance(chunk_rows, int):
            raise TypeError(f"chunk_rows must be None or an int, 1 or more; got {describe(chunk_rows)}")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be None or an int, 1 or more; got {chunk_rows!r}")
    if filter_eps is not None and (not isinstance(filter_eps, numbers.Real) or not 0 < filter_eps < 1):
        raise ValueError(f"filter_eps must be None or a number between 0 and 1, both excluded; got {filter_eps!r}")

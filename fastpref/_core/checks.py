"""Argument checks shared by every public function and its reference.

Shapes, dtypes and devices are checked here, in Python, where an error can name the argument. Values that live in a
tensor (a label's range, the boundaries of packed sequences) are checked inside the operators, because reading them here
would synchronise a GPU and break `torch.compile`'s graph.
"""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

_Check = TypeVar("_Check", bound=Callable[..., Any])
_PLAIN = frozenset({bool, int, float, str, type(None)})

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)
REDUCTIONS = ("none", "sum", "mean")
LARGEST = sys.float_info.max
MODES = ("auto", "save", "recompute")


def describe(value: object) -> str:
    """Return a phrase for an error message: a tensor's dtype, shape and device, or the value's type and repr."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"
    if value.is_nested:
        return f"a nested {value.dtype} tensor on {value.device}"
    layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
    return f"a {layout}{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype], wanted: str) -> None:
    """Raise `TypeError` unless `value` is a dense tensor of one of `dtypes`."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise TypeError(f"{name} must be {wanted}; got {describe(value)}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} must be {wanted} that is neither sparse nor nested; got {describe(value)}")


def check_same_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Raise `ValueError` unless both tensors are on one device."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device, {like.device}; got {describe(value)}")


def shape_error(name: str, value: Tensor, wanted: str, dims: int = 1) -> ValueError:
    """Return a ValueError that says which shape, of `dims` dimensions, is wanted.

    If the tensor has an extra dimension of size 1 at the end, the error suggests `squeeze(-1)`.
    """
    remedy = f": pass {name}.squeeze(-1)" if value.dim() == dims + 1 and value.shape[-1] == 1 else ""
    return ValueError(f"{name} must be {wanted}; got {describe(value)}{remedy}")


def is_like(value: object, checked: Tensor) -> bool:
    """Return whether `value` matches `checked` in every property that is checked, so that it passes too."""
    return (
        isinstance(value, Tensor)
        and value.dtype == checked.dtype
        and value.shape == checked.shape
        and value.device == checked.device
        and value.layout == checked.layout
        and not value.is_nested
    )


def are_like_vectors(first: object, *others: object) -> bool:
    """Return whether `first` is a floating-point tensor (B,), and each of `others` is None or like it."""
    if not isinstance(first, Tensor) or first.is_nested or first.layout is not torch.strided:
        return False
    if first.dtype not in FLOATING or first.dim() != 1:
        return False
    return all(other is None or is_like(other, first) for other in others)


def check_vector(
    name: str, value: object, dtypes: Sequence[torch.dtype], wanted: str, like: tuple[str, Tensor] | None = None
) -> None:
    """Raise unless `value` is a (B,) tensor of one of `dtypes`.

    Args:
        name: the argument's name.
        value: the argument.
        dtypes: the dtypes that it may have.
        wanted: what it must be, in words, such as "a bool tensor (B,)".
        like: the name and the tensor whose first dimension is B, and whose device it must be on; None: any B.

    Raises:
        TypeError: `value` is not a dense tensor of one of `dtypes`.
        ValueError: `value` has another shape, or is on another device.
    """
    check_tensor(name, value, dtypes, wanted)
    assert isinstance(value, Tensor)
    if like is None:
        if value.dim() != 1:
            raise shape_error(name, value, "(B,)")
        return
    like_name, first = like
    if value.dim() != 1 or value.shape[0] != first.shape[0]:
        raise shape_error(name, value, f"(B,) = ({first.shape[0]},), with the B of {like_name}")
    check_same_device(name, value, like_name, first)


def remembered(check: _Check) -> _Check:
    """Cache the result of a check that reads only options, because a training loop repeats the same options.

    Only numbers, strings and None are looked up: the cache distinguishes 1 from True, but not inside a tuple. Options
    of other types are checked at every call. So are all options of a call that Dynamo traces, because Dynamo warns
    about the cache.
    """
    answers = functools.lru_cache(maxsize=256, typed=True)(check)

    @functools.wraps(check)
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, (*arguments, *options.values()))):
            return check(*arguments, **options)
        return answers(*arguments, **options)

    return call  # type: ignore[return-value]


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Return whether `value` is a sequence other than str and bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise `TypeError` unless `value` is a string, and `ValueError` unless it is one of `choices`."""
    if isinstance(value, str) and value in choices:
        return
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name} must be one of {', '.join(map(repr, choices))}; got {describe(value)}")


def as_float(value: object) -> float | None:
    """Return a real number as a float (infinite if it exceeds the range of a float), and None for anything else."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_finite(
    name: str, value: object, *, least: float = -LARGEST, most: float = LARGEST, exclusive: bool = False
) -> float:
    """Return `value` as a float, or raise unless it is a finite number within bounds.

    Args:
        name: the argument's name.
        value: the argument, any real number but a bool.
        least: the lower bound.
        most: the upper bound.
        exclusive: whether the bounds themselves are refused.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is NaN, infinite or out of bounds.
    """
    number = value if type(value) is float else as_float(value)
    if number is not None and (least < number < most if exclusive else least <= number <= most):
        return number
    if most < LARGEST:
        bounds = f" between {least:g} and {most:g}, both excluded" if exclusive else f" in [{least:g}, {most:g}]"
    elif least > -LARGEST:
        bounds = f" above {least:g}" if exclusive else f", not below {least:g}"
    else:
        bounds = ""
    error = TypeError if number is None else ValueError
    raise error(f"{name} must be a finite number{bounds}; got {describe(value)}")


def check_positive(name: str, value: object) -> float:
    """Return `value` as a float, or raise as `check_finite` does unless it is a finite number above 0."""
    return check_finite(name, value, least=0.0, exclusive=True)


def check_int(name: str, value: object, *, least: int | None = None) -> int:
    """Return `value` as an int, or raise unless it is a 64-bit integer of at least `least` and not a bool.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below `least`, or does not fit in 64 bits.
    """
    is_int = type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))
    if is_int and (-(2**63) if least is None else least) <= value < 2**63:  # type: ignore[operator]
        return int(value)  # type: ignore[arg-type]
    bound = " of 64 bits" if least is None else f" of 64 bits, {least} or more"
    raise (ValueError if is_int else TypeError)(f"{name} must be an int{bound}; got {describe(value)}")


def check_bool(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False; got {describe(value)}")


def _check_positions(
    name: str, values: Tensor, axis: str, entry: str, labels: Tensor, cu_seqlens: Tensor | None, sharded: bool = False
) -> None:
    """Check `values`, (B, T, axis) or (N, axis), and the labels and boundaries of its positions."""
    if isinstance(values, Tensor) and values.is_nested:
        raise ValueError(
            f"{name} must not be a nested tensor: pass its values, (N, {axis}), and its offsets as cu_seqlens, to "
            f"a function that takes sequences; got {describe(values)}"
        )
    check_tensor(name, values, FLOATING, f"a fp16, bf16, fp32 or fp64 tensor (B, T, {axis}) or (N, {axis})")
    check_tensor("labels", labels, INTEGER, f"an int64 or int32 tensor of {name}'s shape without {axis}")
    if values.dim() not in (2, 3):
        raise ValueError(f"{name} must be (B, T, {axis}) or (N, {axis}); got {describe(values)}")
    if values.shape[-1] == 0 and not sharded:
        raise ValueError(f"{name} must have at least one {entry}, {axis} > 0; got {describe(values)}")
    packed = cu_seqlens is not None and values.dim() == 3 and labels.dim() == 1
    if labels.shape != (values.shape[1:2] if packed and values.shape[0] == 1 else values.shape[:-1]):
        raise ValueError(
            f"labels must have {name}'s shape without {axis}, {tuple(values.shape[:-1])} "
            f"(aligned with input_ids: the function shifts the labels itself); got {describe(labels)}"
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
        # A single boundary leaves no sequence for the positions. This is the only check of the boundaries that
        # does not read their values.
        if cu_seqlens.shape[0] == 1 and labels.shape[-1] > 0:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {labels.shape[-1]}; got {describe(cu_seqlens)}"
            )


def check_logits(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, *, sharded: bool = False) -> None:
    """Check the arguments of `token_logprobs` and `sequence_logprobs`.

    Args:
        logits: (B, T, V) or (N, V), any strides, fp16, bf16, fp32 or fp64.
        labels: int64 or int32, of logits' shape without V. Packed logits (1, N, V) also take labels (N,).
        cu_seqlens: None, or (S+1,) int32 or int64.
        sharded: whether the logits are a rank's part of the vocabulary, which may be empty.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.
    """
    _check_positions("logits", logits, "V", "vocabulary entry", labels, cu_seqlens, sharded)


def check_transform(temperature: object, logit_scale: object, softcap: object) -> tuple[float, float, float | None]:
    """Return the three scalars of z ← softcap·tanh(z·logit_scale/softcap)/temperature as floats."""
    return (
        check_positive("temperature", temperature),
        check_positive("logit_scale", logit_scale),
        None if softcap is None else check_positive("softcap", softcap),
    )


def check_scoring(ignore_index: object, shift: object) -> int:
    """Check `ignore_index` and `shift`, and return `ignore_index` as an int."""
    check_bool("shift", shift)
    return check_int("ignore_index", ignore_index)


def check_ld(ld_alpha: float | None, shared_lengths: Tensor | None) -> float | None:
    """Check LD-DPO's two arguments, and return `ld_alpha` as a float or None."""
    ld_alpha = None if ld_alpha is None else check_finite("ld_alpha", ld_alpha)
    if shared_lengths is None:
        return ld_alpha
    check_tensor("shared_lengths", shared_lengths, INTEGER, "an int64 or int32 tensor, one length per sequence")
    if ld_alpha is None:
        raise ValueError(f"shared_lengths needs ld_alpha (LD-DPO); got {describe(shared_lengths)} and ld_alpha=None")
    return ld_alpha


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for tensors of `device`."""
    # Dynamo cannot trace torch.amp.is_autocast_available before torch 2.12. Of the devices that fastpref runs on, only
    # meta has no autocast.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, *,
    prefix: str = "", sharded: bool = False,
) -> None:  # fmt: skip
    """Check the arguments of `linear_token_logprobs` and `linear_sequence_logprobs`.

    Args:
        hidden: (B, T, H) or (N, H), any strides, fp16, bf16, fp32 or fp64.
        weight: (V, H), of hidden's dtype. Under autocast, which casts them, the dtypes may differ unless one is fp64.
        labels: int64 or int32, of hidden's shape without H. Packed hidden states (1, N, H) also take labels (N,).
        bias: None, or (V,), of hidden's dtype.
        cu_seqlens: None, or (S+1,) int32 or int64.
        prefix: the prefix of the caller's names of hidden, weight and bias.
        sharded: whether the weight is a rank's part of the vocabulary, which may be empty.

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
            raise ValueError(f"{prefix}bias must be (V,), V = {weight.shape[0]} as in weight; got {describe(bias)}")
        parameters[f"{prefix}bias"] = bias
    dtypes = {hidden.dtype, *(value.dtype for value in parameters.values())}
    cast = autocasts(hidden.device) and torch.float64 not in dtypes
    for name, value in parameters.items():
        check_same_device(name, value, of, hidden)
        if value.dtype != hidden.dtype and not cast:
            raise TypeError(f"{name} must have {of}'s dtype, {hidden.dtype}; got {describe(value)}")


def check_scored_rows(scored_rows: object, sequences: int) -> tuple[int | None, list[int] | None]:
    """Check `scored_rows`. Return the number of rows of the batch and of each sequence; each is None if not given."""
    if scored_rows is None:
        return None, None
    if is_sequence(scored_rows):
        counts = [check_int(f"scored_rows[{i}]", count, least=0) for i, count in enumerate(scored_rows)]
        if len(counts) != sequences:
            raise ValueError(
                f"scored_rows must have one number for each of {sequences} sequences; got {len(counts)}, {counts}"
            )
        return sum(counts), counts
    if isinstance(scored_rows, Tensor):
        raise TypeError(
            "scored_rows must be an int or a sequence of ints that the host knows, such as a list; "
            f"got {describe(scored_rows)}"
        )
    return check_int("scored_rows", scored_rows, least=0), None


def check_mode(mode: object, chunk_rows: object, filter_eps: object) -> tuple[int | None, float | None]:
    """Check `mode`, `chunk_rows` and `filter_eps`. Return the last two as an int and a float, or None."""
    check_choice("mode", mode, MODES)
    rows = None if chunk_rows is None else check_int("chunk_rows", chunk_rows, least=1)
    if filter_eps is None:
        return rows, None
    return rows, check_finite("filter_eps", filter_eps, least=0.0, most=1.0, exclusive=True)

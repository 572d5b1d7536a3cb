"""Counts how often the host waits for a GPU, and tells whether a CUDA graph could hold what it does. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.gpu_stand_in import DeviceTensor, Watcher, gpu_stand_in, leaves

# Operators that answer by a number which the host knows.
KNOWN_BY_THE_HOST = frozenset(("aten::is_pinned", "aten::is_same_size"))
INDEXED = frozenset(("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"))
COPIES = frozenset(("aten::copy", "aten::copy_", "aten::_to_copy"))
# Operators whose implementation for CUDA reads a tensor, though neither their results nor their tags say so, and which
# of their arguments that is. `isin` makes its tensors unique, unless the second is short.
READ_INSIDE = {
    "aten::masked_fill.Tensor": 2,
    "aten::masked_fill_.Tensor": 2,
    "aten::index_fill.int_Tensor": 3,
    "aten::index_fill_.int_Tensor": 3,
    "aten::isin.Tensor_Tensor": 1,
}


class Operation(NamedTuple):
    """A step of the host.

    Attributes:
        name: the operator, or the kernel that is launched.
        given: its arguments: of a GPU's tensor shape, strides and dtype, of all else the value.
        line: the line of fastpref that took it.
        wait: why the host waits for the device in it; None where it does not.
        uncapturable: why a CUDA graph cannot hold it; None where one can.
    """

    name: str
    given: Any
    line: str
    wait: str | None = None
    uncapturable: str | None = None

    def __str__(self) -> str:
        return f"{self.line} {self.name}: {self.wait or self.uncapturable or 'no wait'}"


def _on_device(value: Any) -> bool:
    return isinstance(value, DeviceTensor)


def _on_host(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DeviceTensor)


def _copy_of(func: Any, given: list[Any], made: list[Any]) -> str | None:
    """Return which way an operator copies between host and device, None where it does not."""
    if any(map(_on_device, given)) and any(map(_on_host, made)):
        return "a tensor is copied to the host"
    # A tensor of one number that is no more than an operand is passed by value.
    copied = any(_on_host(x) and (x.dim() > 0 or func._schema.name in COPIES) for x in given)
    return "a tensor is copied from the host" if copied and any(map(_on_device, made)) else None


def _wait_of_index(indices: Any, values: Any = None, *_: Any) -> str | None:
    """Return why the host waits where `indices`, some of them None, choose what is read or written."""
    chosen = [index for index in indices if index is not None]
    masks = [index for index in chosen if index.dtype in (torch.bool, torch.uint8)]
    one_number = _on_host(values) and values.numel() == 1
    if one_number and len(masks) == len(chosen) == 1:
        return None  # PyTorch makes a masked_fill of it
    if masks:
        return "the number of True in a mask is read"
    return "indices or values are copied from the host" if any(map(_on_host, (*chosen, values))) else None


def _wait_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Any], made: list[Any]) -> str | None:
    """Return why the host waits for the device in an operator of it, None where it does not."""
    base = func._schema.name
    if base in INDEXED:
        return _wait_of_index(*args[1:])
    if torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None:
        return "the result's shape is read"
    read = READ_INSIDE.get(func.name())
    if read is not None and _on_device(args[read]):
        return "a value is read inside the operator"
    if base not in KNOWN_BY_THE_HOST and any(isinstance(x, (bool, int, float, complex)) for x in made):
        return "a value is read"
    non_blocking = kwargs.get("non_blocking") or (base == "aten::copy_" and args[2:] == (True,))
    return None if non_blocking else _copy_of(func, given, made)


def _hindrances(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[str | None, str | None]:
    """Return why the host waits in an operator that has run, and why a CUDA graph cannot hold it."""
    given, made = list(leaves((args, kwargs))), list(leaves(result))
    # Collectives of NCCL make the device wait, and not the host.
    if not any(map(_on_device, (*given, *made))) or func.namespace == "c10d":
        return None, None
    wait = _wait_of(func, args, kwargs, given, made)
    if wait is not None:
        return wait, f"the host waits, because {wait}"
    copy = _copy_of(func, given, made)
    if copy is not None:
        return None, f"{copy} once, and not in every replay"
    return None, "random numbers are drawn" if torch.Tag.nondeterministic_seeded in func.tags else None


def _described(value: Any) -> Any:
    """What of an argument a captured graph has fixed."""
    if isinstance(value, DeviceTensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.tolist()
    if isinstance(value, (list, tuple)):
        return [_described(x) for x in value]
    if isinstance(value, dict):
        return {name: _described(x) for name, x in value.items()}
    return value if isinstance(value, (int, str, type(None))) else repr(value)  # equal even where it is NaN


class Trace(Watcher):
    """Keeps every step that the host takes, each as an `Operation`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, line: str) -> None:
        given = () if func.namespace == "c10d" else _described((args, kwargs))
        self.operations.append(Operation(str(func), given, line, *_hindrances(func, args, kwargs, result)))

    def launched(self, kernel: str, args: tuple[Any, ...], kwargs: dict[str, Any], line: str) -> None:
        self.operations.append(Operation(kernel, _described((args, kwargs)), line))

    @property
    def waits(self) -> list[str]:
        """The operators in which the host waits, each with its line and the reason."""
        return [str(operation) for operation in self.operations if operation.wait]


@contextmanager
def host_trace() -> Iterator[Trace]:
    """Run what is inside as on a GPU, and keep the host's steps."""
    trace = Trace()
    with gpu_stand_in(trace):
        yield trace

"""Make operators on CPU tensors call the Triton launchers, as they do on GPU tensors.

Under TRITON_INTERPRET=1 the kernels run interpreted. Inside `sass.compiling(target)` they are compiled and do not run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from fastpref_kernels import cpu, ops

Launcher = Callable[..., Any]


class _Overriding(torch.library.Library):
    """A library whose kernels replace those of an operator until it is destroyed."""

    def __init__(self) -> None:
        super().__init__(ops.NAMESPACE, "IMPL")

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        super().impl(op_name, fn, dispatch_key, **options, allow_override=True)


def _always(device: torch.device) -> bool:
    return True  # not a mock: it would be slower than what is timed here, and Dynamo cannot trace it


def _unchanged(launcher: Launcher) -> Launcher:
    return launcher


@contextmanager
def launchers_on_cpu(wrap: Callable[[Launcher], Launcher] = _unchanged) -> Iterator[None]:
    """Make every operator of fastpref on CPU tensors call its Triton launcher inside this context.

    Args:
        wrap: takes a launcher and returns the function that operators call instead.
    """
    library, launcher = _Overriding(), ops._launcher
    try:
        with (
            mock.patch.object(ops, "_LIBRARY", library),
            mock.patch.object(ops, "_launcher", lambda module, name: wrap(launcher(module, name))),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            ops._implement_triton("CPU")
        with (
            # Without the C++ library, memory for results comes from `torch.empty`, as on a GPU.
            mock.patch.object(cpu, "native", return_value=None),
            mock.patch.object(ops, "fuses_losses", _always),
        ):
            yield
    finally:
        library._destroy()

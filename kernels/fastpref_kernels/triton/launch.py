"""Launch Triton kernels without the work that Triton repeats at every call.

`kernel[grid](...)` binds the arguments, describes each of them, and looks up the compiled kernel by a string of the
descriptions. On the host that takes longer than many kernels take on the device. `launch` looks up what the first such
call compiled by a key that is faster to make. The key holds everything on which Triton specializes a kernel, so two
calls with equal keys run the same compiled kernel in Triton too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastpref_kernels.triton.common import on_device

_TENSORS = (Tensor, torch.nn.Parameter)
_ARGUMENTS = (*_TENSORS, bool, int, float, type(None))
_CONSTANTS = (bool, int, float, str, type(None), tl.dtype)

# None where this module is imported while something replaces it: then every launch is Triton's.
_RUN = JITFunction.run if JITFunction.run.__qualname__ == "JITFunction.run" else None


class _Variant:
    """A kernel with arguments of certain types and certain options.

    Attributes:
        known: whether `key` holds everything on which Triton specializes the kernel for such arguments and options.
        constants: the values of the constants, in the order of the parameters.
        compiled: the compiled kernels by `key`.
    """

    def __init__(self, kernel: Any, types: tuple[type, ...], **options: Any) -> None:
        self.compiled: dict[tuple[Any, ...] | None, CompiledKernel] = {}
        self.known = type(kernel) is JITFunction
        if not self.known:
            return
        given, constants = kernel.params[: len(types)], kernel.params[len(types) :]
        self.known = (
            not any(parameter.is_constexpr for parameter in given)
            and all(parameter.is_constexpr and parameter.name in options for parameter in constants)
            and all(kind in _ARGUMENTS for kind in types)
            and all(map(_equals_no_other, options.values()))
        )
        self.constants = tuple(options.get(parameter.name) for parameter in constants)
        self._tensors = [i for i, kind in enumerate(types) if kind in _TENSORS]
        self._integers = [i for i, kind in enumerate(types) if kind is int]
        specialized = [i for i, parameter in enumerate(given) if not parameter.do_not_specialize]
        self._by_value = [i for i in self._integers if i in specialized]
        self._by_alignment = [
            i for i in self._tensors if i in specialized and not given[i].do_not_specialize_on_alignment
        ]

    def key(self, device: object, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return what Triton specializes the kernel on beside the types and the options, or None if it is more.

        Args:
            device: the current device, as Triton's driver names it.
            arguments: the kernel's arguments without its constants.
        """
        for i in self._integers:
            if not -(2**31) <= arguments[i] < 2**31:
                return None
        return (
            device,
            *[arguments[i].dtype for i in self._tensors],
            *[arguments[i].data_ptr() % 16 == 0 for i in self._by_alignment],
            *[None if arguments[i] == 1 else arguments[i] % 16 == 0 for i in self._by_value],
        )


def _equals_no_other(value: object) -> bool:
    """Return whether no other constant of the same type equals `value`, as 0.0 equals -0.0."""
    return type(value) in _CONSTANTS and not (isinstance(value, float) and (value == 0.0 or math.isnan(value)))


# A cache of variants for each kernel. It keeps its kernel alive, so that no other kernel can have the same id. The
# kernel itself is not the key, because Triton hashes it by its source.
_VARIANTS: dict[int, Callable[..., _Variant]] = {}


def _is_plain(kernel: Any) -> bool:
    """Return whether Triton would only run the kernel: nothing else happens at a launch or alters what it compiles."""
    return (
        JITFunction.run is _RUN
        and not kernel.pre_run_hooks
        and not knobs.runtime.debug
        and not getattr(knobs.compilation, "instrumentation_mode", "")
        and getattr(knobs.runtime, "add_stages_inspection_hook", None) is None
    )


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch `programs` programs of a kernel on the device of its first argument.

    Args:
        kernel: a function decorated with `triton.jit`.
        programs: the size of the grid, which has one dimension.
        arguments: the kernel's arguments, without its constants. The first is a tensor.
        options: the kernel's constants, which are its last parameters, and the compiler's options, by name.
    """
    find = _VARIANTS.get(id(kernel))
    if find is None:
        # The types tell 1, 1.0 and True apart, which are equal.
        cached = functools.lru_cache(maxsize=None, typed=True)
        find = _VARIANTS[id(kernel)] = cached(functools.partial(_Variant, kernel))
    variant = find(tuple(map(type, arguments)), **options)
    if not (variant.known and _is_plain(kernel)):
        with on_device(arguments[0].device):
            kernel[(programs,)](*arguments, **options)
        return
    active = driver.active
    device = active.get_current_device()
    if arguments[0].get_device() not in (device, -1):
        with on_device(arguments[0].device):
            launch(kernel, programs, *arguments, **options)
        return
    key = variant.key(device, arguments)
    compiled = variant.compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *variant.constants, stream=active.get_current_stream(device))
        return
    compiled = kernel[(programs,)](*arguments, **options)
    # On AMD's and Intel's devices Triton specializes on more than the key holds.
    if key is not None and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
        variant.compiled[key] = compiled

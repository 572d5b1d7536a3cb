"""Tensors that every Python check takes for a GPU's, and a context in which fastpref's operators run as they do there.

A `DeviceTensor` holds its numbers in a CPU tensor. Inside `gpu_stand_in`, PyTorch's operators run on those numbers,
`fastpref::` operators run the implementation that is registered for CUDA, and a Triton launch is noted and left out.
So the host takes the very steps that it takes on a GPU, and each of them can be looked at, on any machine.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
import fastpref_kernels
from fastpref_kernels.eager import linear

DEVICE = torch.device("cuda:0")
# What Python asks for when it wants a copy on the host. Autograd's C++ asks for "cpu", without an index, where it makes
# a tensor beside a `DeviceTensor`, and means the GPU.
HOST = torch.device("cpu:0")
PROPERTIES = SimpleNamespace(name="no GPU", major=9, minor=0, multi_processor_count=132)
_PACKAGES = {f"{package.__path__[0]}/": package.__name__ for package in (fastpref, fastpref_kernels)}
_TESTS = f"{Path(__file__).parent}/"
# Launchers, by their module, whose kernels' results may decide what is done next: their definitions make these.
_DEFINITIONS = {
    "linear": (linear.fold, linear.fold_backward),
    "rows": (linear.dot, linear.gather, linear.scatter, linear.rescale),
}


class DeviceTensor(torch.Tensor):
    """A tensor whose `device` is a GPU, made of a CPU tensor that holds its numbers.

    To C++ it is a CPU tensor without memory. Its own methods are those that C++ would answer without an operator,
    because the numbers of a CPU tensor are at hand.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device("cpu"),
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} runs on a DeviceTensor outside of gpu_stand_in")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.numbers!r})"

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return DEVICE.index

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        dtype = dtype or self.dtype
        if device is not None and device.type == "cpu":
            return torch.ops.aten._to_copy(self, dtype=dtype, device=HOST, non_blocking=non_blocking)
        return super().to(dtype)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=DEVICE, **kwargs)


def on_gpu(tensor: Tensor) -> DeviceTensor:
    """Return a leaf `DeviceTensor` of a CPU tensor's numbers, which requires a gradient where that one does."""
    return DeviceTensor(tensor.detach()).requires_grad_(tensor.requires_grad)  # type: ignore[return-value]


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is in lists, tuples and dictionaries, such as an operator's arguments."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def _plain(value: Any) -> Any:
    """Return an operator's argument with CPU tensors for `DeviceTensor`s."""
    if isinstance(value, DeviceTensor):
        return value.numbers
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _own_line() -> str:
    """Return the innermost line of fastpref that is being run, or of the test where there is none."""
    frame, test = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        for package, name in _PACKAGES.items():
            if file.startswith(package):
                return f"{name}/{file[len(package) :]}:{frame.f_lineno}"
        if not test and file.startswith(_TESTS) and file != __file__:
            test = f"{file[len(_TESTS) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return test


def _is_called_by_autograd() -> bool:
    """Return whether C++ of a backward calls an operator, and not Python that the backward runs."""
    frame = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or "_dynamo" in frame.f_code.co_filename
                                 or frame.f_code.co_filename.endswith("_compile.py")):  # fmt: skip
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def _widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A product that only a GPU has, of operands that are narrower than its result."""

    def call(*args: Any, **kwargs: Any) -> Any:
        (dtype,) = (value for value in args if isinstance(value, torch.dtype))
        return function(*(v.to(dtype) for v in args if isinstance(v, Tensor)), **kwargs)

    return call


def _runnable(func: Any) -> Callable[..., Any]:
    """Return what computes an operator's result on a CPU."""
    name, _, overload = str(func).removeprefix("aten.").partition(".")
    if name in ("mm", "addmm", "bmm", "baddbmm") and overload in ("dtype", "dtype_out"):
        return _widened(getattr(torch, name))
    if name == "_pin_memory":
        return lambda tensor, *_: tensor.clone()
    return func


class Watcher:
    """Sees every step that the host takes inside `gpu_stand_in`. Here it looks at none.

    Attributes:
        made: every `DeviceTensor` that was made. One that only C++ refers to, such as a leaf's gradient, can lose its
            numbers to Python's garbage collection in torch 2.8.
    """

    def __init__(self) -> None:
        self.made: list[DeviceTensor] = []

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, line: str) -> None:
        """Look at an operator of PyTorch that has run, called by `line` of fastpref."""

    def launched(self, kernel: str, args: tuple[Any, ...], kwargs: dict[str, Any], line: str) -> None:
        """Look at a launch of a Triton kernel."""


@contextlib.contextmanager
def gpu_stand_in(watcher: Watcher) -> Iterator[None]:
    """Run what is inside as on a GPU: factories with a CUDA device make `DeviceTensor`s, and launches do nothing."""
    with contextlib.ExitStack() as stack:
        # Under ours, so that no operator reaches it: PyTorch then speaks of a GPU without looking for one.
        stack.enter_context(FakeTensorMode())
        # Host data that becomes a device's tensor is made on the host, and copied by an operator that is seen.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        # The tensors are small and many: threads that wait for each other would take longer than the arithmetic.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        for patch in _driver(watcher):
            stack.enter_context(patch)
        stack.enter_context(_Device(watcher))
        yield


def _driver(watcher: Watcher) -> Iterator[Any]:
    """Patches of what asks the driver for a device or a launch."""

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C._DisableTorchDispatch():
            watcher.launched(kernel.fn.__name__, args, kwargs, _own_line())

    yield mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext())
    yield mock.patch.object(torch.cuda, "get_device_properties", return_value=PROPERTIES)
    yield mock.patch("triton.runtime.jit.JITFunction.run", launch)
    for module, definitions in _DEFINITIONS.items():
        kernels = importlib.import_module(f"fastpref_kernels.triton.{module}")
        for definition in definitions:
            launcher = _defined(getattr(kernels, definition.__name__), definition)
            yield mock.patch.object(kernels, definition.__name__, launcher)


def _defined(launcher: Callable[..., Any], definition: Callable[..., Any]) -> Callable[..., Any]:
    """Return a launcher that, after a launch that does nothing, computes by the definition what the kernel would."""

    def call(*args: Any) -> Any:
        result = launcher(*args)
        if len(args) > len(inspect.signature(definition).parameters):
            return result  # on rows that a filter keeps, of which nothing on the host depends
        with torch._C._DisableTorchDispatch():
            made = definition(*map(_plain, args))
            if made is not None:
                result.numbers.copy_(made)
        return result

    return call


class _Device(TorchDispatchMode):
    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastpref":
            name, key = func.name(), torch._C.DispatchKey.CUDA
            if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
                key = torch._C.DispatchKey.CompositeExplicitAutograd
            with self:
                return func._op_dk(key, *args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        result = self._run(func, args, kwargs)
        with torch._C._DisableTorchDispatch():
            self.watcher.ran(func, args, kwargs, result, _own_line())
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wrappers = {id(x.numbers): x for x in leaves((args, kwargs)) if isinstance(x, DeviceTensor)}
        plain_args = [_plain(arg) for arg in args]
        plain = {name: _plain(value) for name, value in kwargs.items() if name != "pin_memory"}
        on_device = bool(wrappers)
        if kwargs.get("device") is not None:
            asked, plain["device"] = torch.device(kwargs["device"]), HOST
            beside = on_device or _is_called_by_autograd()
            on_device = asked.type == DEVICE.type or (beside and asked != HOST)

        def wrap(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(wrap, value))
            if not isinstance(value, Tensor):
                return value
            given = wrappers.get(id(value))
            if given is not None or not on_device:
                return value if given is None else given
            self.watcher.made.append(DeviceTensor(value))
            return self.watcher.made[-1]

        with torch._C._DisableTorchDispatch():
            made = _runnable(func)(*plain_args, **plain)
            for wrapper in wrappers.values():
                if wrapper.shape != wrapper.numbers.shape:
                    raise NotImplementedError(
                        f"{func} gives a tensor of a GPU another shape, which is not kept up with"
                    )
            return wrap(made)

"""A driver for Triton that compiles kernels for a GPU that is not there, and whose launches do nothing.

So the host's part of a launch can be timed, and its decisions tested, on any machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

Launched = Callable[..., None]


class _Utilities:
    """Answer what Triton asks of a GPU when it loads a compiled kernel."""

    def __init__(self) -> None:
        self._functions = itertools.count(1)

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Return a module, a function that no other kernel has, and registers, spills and threads within any limit."""
        return 1, next(self._functions), 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Do nothing."""

    def get_device_properties(self, device: object) -> dict[str, int]:
        """Return the shared memory of an H100."""
        return {"max_shared_mem": 232448}


class StubbedDriver:
    """Stand in for Triton's driver. The device is the driver itself, so its kernels are cached apart from others'."""

    def __init__(self, target: GPUTarget, launched: Launched) -> None:
        self.target = target
        self.utils = _Utilities()

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                pass

            __call__ = staticmethod(launched)

        self.launcher_cls = Launcher

    def get_current_device(self) -> StubbedDriver:
        """Return the only device."""
        return self

    def get_current_stream(self, device: object) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what kernels are compiled for."""
        return self.target


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def stubbed_launches(target: GPUTarget, launched: Launched = _nothing) -> Iterator[StubbedDriver]:
    """Compile for `target` what Triton launches inside this context, and call `launched` where a GPU would run it.

    Args:
        target: the GPU.
        launched: a function of what Triton passes to its launchers: the grid, the stream, the function, metadata and
            hooks, and the kernel's arguments.
    """
    stub = StubbedDriver(target, launched)
    # Restored by hand: resetting the driver would look for a GPU.
    with mock.patch.dict(vars(driver)):
        driver.set_active(cast(Any, stub))
        yield stub

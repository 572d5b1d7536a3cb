"""Replace Triton's driver by one that compiles kernels for a GPU that is absent, and whose launches do nothing.

The part of a launch that runs on the host can then be timed and tested on any machine.
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
    """Answer the calls that Triton makes to load a compiled kernel."""

    def __init__(self) -> None:
        self._functions = itertools.count(1)

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Return a module, a new function, and registers, spills and threads within any limit."""
        return 1, next(self._functions), 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Do nothing."""

    def get_device_properties(self, device: object) -> dict[str, int]:
        """Return the shared memory of an H100."""
        return {"max_shared_mem": 232448}


class StubbedDriver:
    """Stand in for Triton's driver; the device is the driver itself, so that its kernels have a cache of their own."""

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
        """Return the target that kernels are compiled for."""
        return self.target


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def stubbed_launches(target: GPUTarget, launched: Launched = _nothing) -> Iterator[StubbedDriver]:
    """Compile the kernels that Triton launches inside this context, and call `launched` instead of running them.

    Args:
        target: the GPU to compile for.
        launched: takes what Triton passes to its launchers: grid, stream, function, metadata, hooks and arguments.
    """
    stub = StubbedDriver(target, launched)
    # Patched, because `driver.reset_active` would look for a GPU.
    with mock.patch.dict(vars(driver)):
        driver.set_active(cast(Any, stub))
        yield stub

"""Run the public functions on CPU tensors by the Triton launchers, with small blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.triton_on_cpu import launchers_on_cpu
from fastpref_kernels.triton import launches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else "xpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The hook is given the tests of all folders.
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    first, step = map(int, os.environ.get("LAUNCHED_PART", "0/1").split("/"))
    left_out = {id(item) for i, item in enumerate(ours) if i % step != first}
    items[:] = [item for item in items if id(item) not in left_out]
    for item in ours:
        # This folder is left out where nothing runs its kernels, but for a command line that names it.
        if not (INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or Triton's interpreter by TRITON_INTERPRET=1"))
        # numpy warns where a GPU is silent: infinities and NaNs are what several of these tests are about.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        # The interpreter of Triton 3.6 and older does this, and NumPy 2.4 refuses it: use an older NumPy there.
        item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"))


def travelling(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Return `launcher` on the GPU's copies of CPU tensors, strides and all; what it writes in place comes back too.

    Under the interpreter the copies are a CPU's as well, so that a machine without a GPU tests this too.
    """

    def call(*arguments: Any) -> Any:
        # A copy a storage: a gradient over the logits is written where they are read.
        copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def there(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            held = value.untyped_storage()
            if held.data_ptr() not in copies:
                copies[held.data_ptr()] = held, torch.UntypedStorage(held.nbytes(), device=DEVICE).copy_(held)
            moved = torch.empty(0, dtype=value.dtype, device=DEVICE)
            return moved.set_(copies[held.data_ptr()][1], value.storage_offset(), value.shape, value.stride())

        result = launcher(*map(there, arguments))
        for held, copy in copies.values():
            held.copy_(copy)
        return tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, result)

    return call


@pytest.fixture(autouse=True)
def small_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Small blocks, so that a small vocabulary has full blocks, a last one, and one with the label in it.
    for kernel in launches.ROWS:
        monkeypatch.setitem(launches.ROWS, kernel, launches.Launch(32, 1))
    # And segments of two blocks, so that it has several.
    monkeypatch.setattr(launches, "SHORTEST_SEGMENT", 64)
    for kernel in launches.SMALL.keys() - {"order", "gae"}:
        monkeypatch.setitem(launches.SMALL, kernel, launches.SMALL[kernel]._replace(block=32))
    with launchers_on_cpu(travelling):
        yield

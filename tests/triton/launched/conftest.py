"""Puts the Triton launchers where a CPU's operators are, so that the public functions run them on CPU tensors.

Under the interpreter they take the CPU tensors themselves; on a machine with a GPU, copies that travel there and back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastpref_kernels import cpu, ops
from fastpref_kernels.triton import logprobs, loss, preference, reward

LOGPROB_FUNCTIONS = ("logprobs", "write_gradient")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # This folder is left out where nothing runs its kernels, but for a command line that names it.
    if not (INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available()):
        for item in (item for item in items if Path(__file__).parent in item.path.parents):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or Triton's interpreter by TRITON_INTERPRET=1"))
    # numpy warns where a GPU is silent: infinities and NaNs are what several of these tests are about.
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        # The interpreter of Triton 3.6 and older does this, and NumPy 2.4 refuses it: use an older NumPy there.
        item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"))


def travelling(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """`launcher` on the GPU's copies of its CPU tensors, strides and all; what it wrote in place comes back too."""
    if INTERPRETED:
        return launcher
    device = "cuda" if torch.cuda.is_available() else "xpu"

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = torch.empty(0, dtype=value.dtype, device=device)
        flat = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
        return storage.set_(flat.to(device)).as_strided(value.shape, value.stride(), value.storage_offset())

    def call(*arguments: Any) -> Any:
        # One copy of a tensor that is given twice: a gradient over the logits is written where they are read.
        copies = {id(value): there(value) for value in arguments}
        result = launcher(*(copies[id(value)] for value in arguments))
        if result is None:  # what is written is the first argument
            arguments[0].copy_(copies[id(arguments[0])])
        return tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, result)

    return call


@pytest.fixture(autouse=True)
def launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small blocks, so that a small vocabulary has full blocks, a last one, and one with the label in it.
    for launches in ("FORWARD_LAUNCH", "STATISTICS_LAUNCH", "BACKWARD_LAUNCH"):
        monkeypatch.setattr(logprobs, launches, dict.fromkeys((2, 4, 8), (32, 1)))
    monkeypatch.setattr(loss, "TILE", 64)
    kernels = SimpleNamespace(**{name: travelling(getattr(logprobs, name)) for name in LOGPROB_FUNCTIONS})
    kernels.empty = lambda shape, dtype: torch.empty(shape, dtype=dtype)
    monkeypatch.setattr(cpu, "native", lambda: kernels)
    monkeypatch.setattr(ops, "fuses_losses", lambda device: True)


@pytest.fixture(autouse=True, scope="session")
def loss_operators() -> Iterator[None]:
    library = torch.library.Library("fastpref", "IMPL")
    modules = {"preference": preference, "reward": reward}
    for name in ops.LOSSES:
        library.impl(name, travelling(getattr(modules[ops.LOSSES[name]], name)), "CPU")
    yield
    library._destroy()

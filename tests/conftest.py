"""What every test runs under: fixed seeds, and memory that holds NaN until something writes it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# cuBLAS reads it as CUDA starts, and torch before 2.10 refuses its deterministic products without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor

from fastpref_kernels import cpu


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Return the number of workers of `-n auto`: xdist's own choice counts cores that this process may not use."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else usable_cores()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Set the threads of each worker, which inherits this environment, before it imports PyTorch."""
    # Two at least, or loops that are split between threads would never be split.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, usable_cores() // len(specs))))
    # A thread that waits actively keeps a core from the other workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_finish() -> None:
    """Hide what the imports made from the garbage collector, which every TRL trainer calls."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Show it again, so that the interpreter frees it as it exits."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start slow tests first: near the end no worker then waits for one that has just begun."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """accelerate keeps the precision that a process first asked for, and refuses another."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20230529)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, also those made in C++, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unpoisoned(poison: None) -> None:
    """PyTorch as users run it: nothing deterministic but what we make so, and untouched memory left untouched."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what `torch.compile` has compiled, before a test and after it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def logits(generator: torch.Generator) -> Tensor:
    """(2, 4, 7) float64."""
    return 3 * torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels(generator: torch.Generator) -> Tensor:
    """(2, 4) for `logits`: a prompt is ignored in one sequence, padding in the other."""
    labels = torch.randint(7, (2, 4), generator=generator)
    labels[0, :2] = -100
    labels[1, -1] = -100
    return labels


@pytest.fixture(params=["native", "eager"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run on the C++ operators, and again on the PyTorch ones that stand in where there is no compiler."""
    if request.param == "eager":
        monkeypatch.setattr(cpu, "native", lambda: None)
    else:
        assert cpu.native() is not None
    return request.param


@pytest.fixture
def scored_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions that each call of our operator was given."""
    rows, own = [], torch.ops.fastpref.linear_logprobs

    def counted(hidden: Tensor, *args: Any) -> Any:
        rows.append(hidden.shape[:-1].numel())
        return own(hidden, *args)

    monkeypatch.setattr(torch.ops.fastpref, "linear_logprobs", counted)
    return rows

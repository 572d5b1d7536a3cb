"""`launch` runs what Triton's own launch would run, and calls Triton's own only where it has to.

The launches are stubbed, so that what they are given can be read without a GPU.
"""

from __future__ import annotations

import contextlib
import math
import operator
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from benchmarks import sass
from benchmarks.stubbed_driver import stubbed_launches
from fastpref_kernels.triton import launch as launch_module
from fastpref_kernels.triton.common import split
from fastpref_kernels.triton.launch import launch


@triton.jit(do_not_specialize=["length", "fixed"], do_not_specialize_on_alignment=["anywhere", "width"])
def kernel(
    aligned, anywhere, fixed, optional, length, width, number, value, flag,
    CONSTANT: tl.constexpr, NAME: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Take an argument of each kind that Triton specializes on in its own way."""


MEMORY = torch.zeros(64, dtype=torch.float64)


def at(offset: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor that begins `offset` bytes after an address that 16 divides."""
    assert MEMORY.data_ptr() % 16 == 0
    return MEMORY.view(torch.uint8)[offset : offset + 32].view(dtype)


TENSORS = [at(0), at(16), at(4), at(8), at(0, torch.bfloat16), at(8, torch.int64), torch.nn.Parameter(at(0))]
INTEGERS = [1, 2, 16, 17, 0, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63]
# What a call passes in the place of each argument; the first value is that of the call that the others vary.
VALUES: dict[str, list[Any]] = {
    "aligned": TENSORS,
    "anywhere": TENSORS,
    "fixed": TENSORS,
    "optional": [*TENSORS, None],
    "length": [*INTEGERS, None],
    "width": INTEGERS,
    "number": INTEGERS,
    "value": [0.5, 1.0, 0.0, None, 1, 16],
    "flag": [True, False, 1],
    "CONSTANT": [1, True, 1.0, 0, False, 0.0, -0.0, None, "1", 2**40, math.inf, math.nan],
    "NAME": ["sum", "mean", None],
    "ACC": [tl.float32, tl.float64],
    "num_warps": [4, 8],
    "num_stages": [3, 1],
    "enable_fp_fusion": [True, False],
}
ARGUMENTS = 9


def calls() -> list[list[Any]]:
    """Return the values of every call that differs from the first in one argument, and of some that differ in many."""
    first = [values[0] for values in VALUES.values()]
    found = [first]
    for i, values in enumerate(VALUES.values()):
        found += [[*first[:i], value, *first[i + 1 :]] for value in values[1:]]
    chance = random.Random(0)
    return found + [[chance.choice(values) for values in VALUES.values()] for _ in range(50)]


Launched = list[tuple[Any, ...]]


@pytest.fixture
def launched() -> Iterator[Launched]:
    """Stub Triton's launches, and yield a list of what they are given."""
    launches: Launched = []
    with stubbed_launches(sass.TARGETS["sm_90"], lambda *given: launches.append(given)):
        yield launches


def split_call(values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return a call's arguments and options."""
    return values[:ARGUMENTS], dict(zip(list(VALUES)[ARGUMENTS:], values[ARGUMENTS:], strict=True))


def test_every_launch_runs_what_triton_would(launched: Launched) -> None:
    repeated = calls() * 2
    random.Random(1).shuffle(repeated)
    for values in repeated:
        arguments, options = split_call(values)
        launch(kernel, 3, *arguments, **options)
        ours = launched.pop()
        compiled = kernel[(3,)](*arguments, **options)
        tritons = launched.pop()
        assert ours[4] == compiled.function == tritons[4], values
        # The grid, the stream, the function, and the arguments with the constants; between them, what hooks receive.
        assert ours[:5] == (3, 1, 1, 0, ours[4])
        assert all(map(operator.is_, ours[-12:], tritons[-12:]))
    assert not launched


def first_call(**changed: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments and options of the first of `calls`, with some of them changed."""
    return split_call([changed.get(name, values[0]) for name, values in VALUES.items()])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"aligned": at(4), "optional": None, "length": 17, "width": 2**31 - 1, "number": 16},
        {"aligned": TENSORS[-1], "fixed": at(8, torch.int64), "value": 1, "flag": False},
        {"CONSTANT": math.inf, "NAME": None, "ACC": tl.float64, "num_warps": 1},
    ],
)
def test_the_second_launch_is_not_tritons(changed: dict[str, Any], launched: Launched) -> None:
    arguments, options = first_call(**changed)
    launch(kernel, 1, *arguments, **options)
    with mock.patch.object(kernel, "device_caches", None):  # without which Triton finds no compiled kernel
        launch(kernel, 2, *arguments, **options)
    first, second = launched
    assert first[4] == second[4]
    assert second[:3] == (2, 1, 1)


def test_launches_that_only_compile_are_all_seen(launched: Launched) -> None:
    arguments, options = first_call()
    launch(kernel, 1, *arguments, **options)
    with sass.compiling("sm_90") as compiled:
        launch(kernel, 1, *arguments, **options)
        launch(kernel, 1, *arguments, **options)
    assert len(compiled) == 2
    assert len(launched) == 1
    launch(kernel, 1, *arguments, **options)
    assert len(launched) == 2


def test_tritons_hooks_see_every_launch(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, options = first_call()
    seen: list[str] = []
    monkeypatch.setattr(kernel, "pre_run_hooks", [])
    launch(kernel, 1, *arguments, **options)
    kernel.add_pre_run_hook(lambda *_, **__: seen.append("before"))
    launch(kernel, 1, *arguments, **options)
    launch(kernel, 1, *arguments, **options)
    assert seen == ["before", "before"]
    kernel.pre_run_hooks.clear()
    # The launcher, which is stubbed here, calls these.
    enter = mock.Mock()
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", enter)
    launch(kernel, 1, *arguments, **options)
    assert launched[-1][7] is enter
    assert launched[-1][6].get()["name"] == "kernel"


def test_knobs_that_change_what_is_compiled_are_obeyed(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, options = first_call()
    launch(kernel, 1, *arguments, **options)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    launch(kernel, 1, *arguments, **options)
    monkeypatch.setattr(knobs.runtime, "debug", False)
    launch(kernel, 1, *arguments, **options)
    plain, debugged, again = (given[4] for given in launched)
    assert plain == again != debugged


def test_a_kernel_of_another_kind_is_launched_by_itself() -> None:
    interpreted = mock.MagicMock()
    launch(interpreted, 5, MEMORY, 1, BLOCK=2)
    interpreted.__getitem__.assert_called_once_with((5,))
    interpreted[(5,)].assert_called_once_with(MEMORY, 1, BLOCK=2)


def test_the_first_tensors_device_is_current_at_a_launch(launched: Launched) -> None:
    arguments, options = first_call()
    devices = [0]

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        devices.append(1)
        yield
        devices.pop()

    with (
        mock.patch.object(driver.active, "get_current_device", side_effect=lambda: devices[-1]),
        mock.patch.object(driver.active, "get_current_stream", lambda device: 10 + device),
        mock.patch.object(launch_module, "on_device", on_device),
        mock.patch.object(Tensor, "get_device", return_value=1),
    ):
        launch(kernel, 1, *arguments, **options)
        launch(kernel, 1, *arguments, **options)
        with mock.patch.object(Tensor, "get_device", return_value=0):
            launch(kernel, 1, *arguments, **options)
    assert [given[3] for given in launched] == [11, 11, 10]
    assert launched[0][4] == launched[1][4] != launched[2][4]  # a function is loaded on one device
    assert devices == [0]


def test_floats_are_split_as_float32_rounds_them() -> None:
    for value in [0.1, -0.1, 1 / 3, 1e-45, 1e-50, 3.4e38, 16777217.0, 0.0, 5, math.inf, -math.inf]:
        high, low = split(value)
        assert high == torch.tensor(value, dtype=torch.float32).item()
        assert high + low == value
    assert split(1e39) == (math.inf, 0.0)
    assert math.isnan(split(math.nan)[0])

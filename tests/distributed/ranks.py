"""The registry of the checks of two ranks, and the program that torchrun runs.

A check is a function of no rank in particular: it makes the whole problem from a seed, as one process would, and
asserts what this rank is to hold of the answer.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

CHECKS: dict[str, Callable[[], None]] = {}


def over(**axes: list[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check for every combination of values, or one check without values."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*axes.values()):
            given = dict(zip(axes, values, strict=True))
            name = "-".join(str(value).removeprefix("torch.") for value in values)
            CHECKS[f"{function.__name__}[{name}]" if axes else function.__name__] = lambda given=given: function(
                **given
            )
        return function

    return register


def parts(whole: Tensor, dim: int = 0) -> list[Tensor]:
    """Return the parts of every rank, cut as torch.chunk and DTensor cut: the last may be smaller, or empty."""
    size = -(-whole.shape[dim] // dist.get_world_size())
    return [
        whole.narrow(dim, min(r * size, whole.shape[dim]), max(0, min(size, whole.shape[dim] - r * size)))
        for r in range(dist.get_world_size())
    ]


def own(whole: Tensor, dim: int = 0) -> Tensor:
    """Return this rank's part of a gradient or a parameter."""
    return parts(whole, dim)[dist.get_rank()].clone()


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Check the largest error relative to the largest value, with the same infinities and NaN nowhere."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    infinite = wanted.isinf()
    assert torch.equal(found[infinite], wanted[infinite])
    found, wanted = found[~infinite], wanted[~infinite]
    if not wanted.numel():
        return
    scale = wanted.double().abs().amax().clamp(min=1e-9)
    off = ((found.double() - wanted.double()).abs().amax() / scale).item()
    assert off <= tolerance, f"relative error {off:.2e}, allowed {tolerance:.0e}"


def main() -> None:
    """Run every check, and write the errors to this rank's file."""
    out = sys.argv[1]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    results = {}
    for name, function in CHECKS.items():
        try:
            function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(results))
        failed = torch.tensor(float(bool(results[name])))
        dist.all_reduce(failed)  # a rank that failed has left its collectives, and the others with them
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(results))
    # What holds a group at the interpreter's end is torn down after the threads that serve it: now and then it aborts.
    mesh.cache_clear()
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()

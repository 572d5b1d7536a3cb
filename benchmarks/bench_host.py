"""Measure the host time of calls that a GPU waits for: packing a float argument, a fold, losses of (B,) tensors.

python benchmarks/bench_host.py [--rounds N] [--device cpu|cuda]

Without a GPU, kernels are compiled for one and their launches do nothing, and PyTorch runs on the CPU.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

import fastpref
from benchmarks import machine, sass
from benchmarks.stubbed_driver import stubbed_launches
from benchmarks.triton_on_cpu import launchers_on_cpu
from fastpref import reference
from fastpref_kernels.contract import RowSums
from fastpref_kernels.triton import linear
from fastpref_kernels.triton.common import split

PAIRS, ANSWERS = 256, 4
ROWS, COLUMNS = 64, 4096  # of a tile; the host time depends on neither
# A round is shorter than a scheduler's time slice, so that most rounds are not interrupted.
ROUND_SECONDS = 3e-4

Case = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """The microseconds of a call: median and quartiles over rounds."""

    q1: float
    median: float
    q3: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.q1:.2f}, {self.q3:.2f}]"


def timed(cases: dict[str, Case], rounds: int, synchronize: Case) -> dict[str, Timing]:
    """Time the cases in turn, round by round, so that the load on the machine affects all alike."""
    calls, seconds = {}, {name: [] for name in cases}
    for name, case in cases.items():
        calls[name] = max(1, int(ROUND_SECONDS / min(_seconds(case, 1) for _ in range(20))))
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, case in cases.items():
                synchronize()  # a full queue of launches would make the host wait
                case()  # refills the caches after the other cases
                seconds[name].append(_seconds(case, calls[name]))
    finally:
        if collects:
            gc.enable()
    return {
        name: Timing(*(1e6 * quartile for quartile in statistics.quantiles(taken, n=4)))
        for name, taken in seconds.items()
    }


def _seconds(case: Case, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        case()
    return (time.perf_counter() - begin) / calls


def fold(device: str) -> Case:
    """Return a call that folds one tile, as the loop over tiles does."""
    z = torch.zeros(ROWS, COLUMNS, device=device)
    targets = torch.zeros(ROWS, dtype=torch.int64, device=device)
    state = RowSums.start((ROWS,), torch.device(device))
    anchors, masses = torch.zeros(2, ROWS, dtype=torch.float64, device=device)
    store = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    return lambda: linear.fold(z, None, targets, 0, 1.0, 1.0, None, 0, state, anchors, masses, store)


def losses(device: str) -> dict[str, tuple[list[Tensor], dict[str, Any]]]:
    """Return the arguments and options of each loss by name."""
    chosen, rejected = (torch.randn(PAIRS, device=device, requires_grad=True) for _ in range(2))
    ref_chosen, ref_rejected = torch.randn(2, PAIRS, device=device)
    rewards = torch.randn(PAIRS, ANSWERS, device=device, requires_grad=True)
    best = torch.zeros(PAIRS, dtype=torch.int64, device=device)
    ranks = torch.rand(PAIRS, ANSWERS, device=device).argsort(-1)
    return {
        "dpo_loss": ([chosen, rejected, ref_chosen, ref_rejected], {}),
        "kto_loss": ([chosen, ref_chosen, chosen > 0], {"kl": 0.5}),
        "pairwise_reward_loss": ([chosen, rejected], {}),
        "best_of_k_loss": ([rewards, best], {}),
        "ranking_loss": ([rewards, ranks], {}),
        "plackett_luce_loss": ([rewards, ranks], {}),
    }


def step(function: Callable[..., Any], tensors: list[Tensor], options: dict[str, Any]) -> Case:
    """Return a call of the forward and backward of a loss."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]

    def call() -> None:
        result = function(*tensors, **options)
        torch.autograd.grad(result if isinstance(result, Tensor) else result.loss, leaves)

    return call


@contextmanager
def launching(device: str) -> Iterator[None]:
    """Make the losses of tensors on `device` launch Triton kernels inside this context."""
    with (
        stubbed_launches(sass.TARGETS["sm_90"]) if device == "cpu" else nullcontext(),
        launchers_on_cpu() if device == "cpu" else nullcontext(),
    ):
        yield


def measured(device: str, rounds: int) -> dict[str, Timing]:
    """Return the times of all cases; that of the reference of a loss has the prefix "reference."."""
    cases: dict[str, Case] = {
        "a float, packed before": lambda: split(0.3),
        "a float, packed for the first time": lambda: split.__wrapped__(0.3),
        "fold of a tile": fold(device),
    }
    for name, (tensors, options) in losses(device).items():
        cases[name] = step(getattr(fastpref, name), tensors, options)
        cases[f"reference.{name}"] = step(getattr(reference, name), tensors, options)
    with launching(device):
        return timed(cases, rounds, torch.cuda.synchronize if device == "cuda" else lambda: None)


def main(
    rounds: Annotated[int, typer.Option(help="How often each case is timed")] = 300,
    device: Annotated[str, typer.Option(help="cpu or cuda; the default is the GPU if there is one")] = "",
) -> None:
    """Print the microseconds on the host: the median, and the quartiles in brackets."""
    torch.set_num_threads(1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = measured(device, rounds)
    launches = "launches are stubbed" if device == "cpu" else "launches are real and not waited for"
    caption = ", ".join(f"{name} {value}" for name, value in machine.provenance(device).items())
    table = Table(title=f"Host microseconds of a call, forward and backward of a loss; {launches}", caption=caption)
    table.add_column("call")
    table.add_column("fastpref", justify="right")
    table.add_column("the formula in plain PyTorch", justify="right")
    for name, timing in found.items():
        if not name.startswith("reference."):
            table.add_row(name, str(timing), str(found.get(f"reference.{name}", "")))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)

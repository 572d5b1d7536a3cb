"""Check, time and measure the memory of the rows of one shape; every subject uses this."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import fastpref
from benchmarks import machine, peers
from benchmarks.store import Row, Rows
from fastpref.testing import memory
from fastpref.testing.accuracy import ulp

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOCATORS = {"default": {}, "THP": {"THP_MEM_ALLOC_ENABLE": "1"}}
MIB = 2**20
# A peer whose error is this many times what is allowed is wrong and not timed.
WRONG = 10
# Seconds. Several calls are timed as one if a call is shorter.
SHORTEST = 1e-3

# On a GPU, copies of the inputs are rotated until this many bytes lie between two uses of one: several times its L2.
ROTATED = 256 * MIB
PART = 2**24  # elements that are compared at a time, because float64 copies are large

Say = Callable[..., None]


def turns(nbytes: int, device: str) -> int:
    """Return how many copies of inputs of `nbytes` bytes are rotated, so that no cache holds one until its next use."""
    return max(1, math.ceil(ROTATED / nbytes)) if device == "cuda" else 1


def furthest(found: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference, or NaN if anything is NaN."""
    parts = zip(found.flatten().split(PART), truth.flatten().split(PART), strict=True)
    return torch.stack([(f.double() - t).abs().max() for f, t in parts]).max().item()


def ulps(truth: Tensor, dtype: torch.dtype) -> float:
    """Return four spacings of `dtype` at the largest magnitude of `truth`."""
    return 4 * ulp(dtype, truth.abs().max().item())


@dataclass(frozen=True)
class Options:
    """Options of a measurement.

    Attributes:
        rounds: how often each row is timed; None takes as many rounds as fit into `seconds`, from 5 to 25.
        seconds: the time for all rounds of a shape.
        peers: measure the peers whose names contain one of these; None measures all, () none.
        peer_file: a Python file with more peers.
        without: the rows that have ended their process before, and how.
    """

    rounds: int | None = None
    seconds: float = 4.0
    peers: tuple[str, ...] | None = None
    peer_file: Path | None = None
    without: dict[str, str] = field(default_factory=dict)

    def chosen(self, entries: list[peers.Entry]) -> list[peers.Entry]:
        """Return the entries of fastpref and of the peers that are asked for."""
        if self.peers is None:
            return entries
        wanted = [part.lower() for part in self.peers]
        return [entry for entry in entries if entry.ours or any(part in entry.name.lower() for part in wanted)]


@dataclass(frozen=True)
class Case:
    """A function that is timed, and one that is called before it and not timed."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None

    def seconds(self, cuda: bool, calls: int = 1) -> float:
        """Return the seconds of a call, as the mean over `calls` calls."""
        if not cuda:
            start = time.perf_counter()
            for _ in range(calls):
                self.run()
            return (time.perf_counter() - start) / calls
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # the launches queue behind this, so that the device never waits for Python
        begin.record()
        for _ in range(calls):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


def interleaved(
    cases: dict[Any, Case], cuda: bool, rounds: int | None, seconds: float, say: Say
) -> dict[Any, list[float]]:
    """Return the seconds of each case in each round, without the first round, which warms up.

    Each round has its own order. The state that a case leaves in the allocator and the operating system slows the next
    case, which must not always be the same one.
    """
    names, order = list(cases), random.Random(0)
    calls = dict.fromkeys(names, 1)
    found: dict[Any, list[float]] = {name: [] for name in names}
    number, last = -1, rounds or math.inf
    while number < last:
        start = time.perf_counter()
        # All run before the first timing: a case prepared just before its own would find its logits in the cache.
        for name in names:
            if before := cases[name].before:
                before()
        for name in order.sample(names, len(names)):
            taken = cases[name].seconds(cuda, calls[name])
            if number >= 0:
                found[name].append(taken)
            elif cases[name].before is None:
                calls[name] = max(1, math.ceil(SHORTEST / max(taken, 1e-9)))
        number += 1
        if number == 0 and rounds is None:
            last = min(max(5, int(seconds / (time.perf_counter() - start))), 25)
        say("round", max(number, 0))
    return found


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Return the peak of a call in bytes above what was held before it; fastpref's kept memory is released first."""
    fastpref.release_memory()
    return memory.peak_bytes(run, torch.device(device))


def statistics_of(seconds: list[float]) -> Row:
    """Return the median, the quartiles and the minimum in milliseconds."""
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    least, q1, median, q3 = torch.tensor(seconds, dtype=torch.float64).mul(1e3).quantile(shares).tolist()
    return {"ms": median, "ms_q1": q1, "ms_q3": q3, "ms_min": least, "rounds": len(seconds)}


@dataclass(frozen=True)
class Floor:
    """A row that does the least work of a step, to compare the others with.

    Attributes:
        case: the function that is timed.
        gbytes: the GB that it moves.
        gflops: the GFLOP that it computes.
    """

    case: Case
    gbytes: float
    gflops: float = 0.0


class Problem(Protocol):
    """One shape of a subject: its inputs, the float64 answer, and the step of each entry."""

    def check(self, entry: peers.Entry, function: Callable[..., Any]) -> tuple[Row, list[tuple[float, float]]]:
        """Return the errors of an entry as fields of its row, and as pairs of error and limit."""
        ...

    def cases(self, entry: peers.Entry, function: Callable[..., Any]) -> dict[str, Case]:
        """Return the timed functions of an entry by pass, the whole step first."""
        ...

    def floors(self) -> dict[str, Floor]:
        """Return the floors by name."""
        ...

    def work(self, name: str, which: str) -> tuple[float, float, str]:
        """Return the GB and GFLOP that a pass of an entry needs at least, and the name of its floor."""
        ...

    def made(self, entry: peers.Entry) -> float:
        """Return the MiB of gradients that a step leaves, which do not count as overhead."""
        ...

    def clear(self) -> None:
        """Release the gradients that a step has left."""
        ...

    def release(self) -> None:
        """Release the float64 answers and whatever a check has left."""
        ...


class NotHereError(RuntimeError):
    """Raised for an entry that this machine cannot run."""


def verdict_of(met: BaseException) -> str:
    """Return "absent" if the entry is not installed or cannot run here, and "failed" otherwise."""
    return "absent" if isinstance(met, (NotHereError, ModuleNotFoundError)) else "failed"


def reason(met: BaseException) -> str:
    """Describe an exception in one line."""
    if isinstance(met, NotHereError):
        return str(met)
    lines = str(met).strip().splitlines()
    return " ".join([type(met).__name__, *(line.strip() for line in lines[-1:])])[:200]


def judged(entry: peers.Entry, errors: list[tuple[float, float]]) -> str:
    """Return "within" or "beyond" the limits; raise `ValueError` if a peer is far beyond, or fastpref is at all."""
    worst = max((off / limit if math.isfinite(off) else math.inf for off, limit in errors), default=0.0)
    if worst <= 1:
        return "within"
    if entry.ours or worst > WRONG:
        said = ", ".join(f"{off:.1e} (allowed {limit:.1e})" for off, limit in errors)
        raise ValueError(f"wrong, and not timed: off by {said}")
    return "beyond"


Names = tuple[str, str]  # a row's, and its pass


def measured(problem: Problem, entries: list[peers.Entry], device: str, options: Options, say: Say) -> Rows:
    """Check the entries of a shape, time them in turn, measure their memory, and return the rows.

    An entry that fails gives a row with the reason. `say("on", name)` is called before an entry runs, so that an entry
    that ends the process is known.
    """
    rows: dict[Names, Row] = {}
    cases: dict[Names, Case] = {}
    chosen = options.chosen(entries)
    for entry in chosen:
        say("on", entry.name)
        row: Row = {"package": entry.package, "version": machine.package_version(entry.package)}
        try:
            timed = checked(problem, entry, device, options, row)
        except Exception as met:
            rows[entry.name, ""] = {**row, "gate": verdict_of(met), "problem": reason(met)}
            if device == "cuda":
                torch.cuda.synchronize()  # an error that stays with the device ends the process here, at this entry
            continue
        for which, case in timed.items():
            cases[entry.name, which], rows[entry.name, which] = case, dict(row)
    say("on", "")
    problem.release()
    gc.collect()
    floors = problem.floors()
    for name, floor in floors.items():
        cases[name, ""] = floor.case
        rows[name, ""] = {"package": "floor", "gate": "floor", "gbytes": floor.gbytes, "gflops": floor.gflops}
    for names, seconds in interleaved(cases, device == "cuda", options.rounds, options.seconds, say).items():
        rows[names] |= statistics_of(seconds)
    for (name, which), row in rows.items():
        if "ms" not in row:
            continue
        if name not in floors:
            row["gbytes"], row["gflops"], floor = problem.work(name, which)
            if floor:
                row["of_floor"] = rows[floor, ""]["ms"] / row["ms"]
            if (chosen[0].name, which) in rows:
                row["over_ours"] = row["ms"] / rows[chosen[0].name, which]["ms"]
        row["gbytes_per_s"], row["gflops_per_s"] = (1e3 * row[field] / row["ms"] for field in ("gbytes", "gflops"))
    for entry in chosen:
        whole = next((names for names in cases if names[0] == entry.name), None)
        if whole is not None:
            say("on", entry.name)
            rows[whole] |= _memory(problem, entry, cases[whole], device, rows[whole]["ms"] / 1e3)
    return [{"name": name, "pass": which, **row} for (name, which), row in rows.items()]


def checked(problem: Problem, entry: peers.Entry, device: str, options: Options, row: Row) -> dict[str, Case]:
    """Check an entry, add its errors to `row`, and return its timed functions; raise if it cannot run or is wrong."""
    if entry.name in options.without:
        raise RuntimeError(options.without[entry.name])
    if device not in entry.devices:
        raise NotHereError(f"runs on {', '.join(entry.devices)} only")
    function = entry.load()
    errors, limits = problem.check(entry, function)
    row |= errors
    row["gate"] = judged(entry, limits)
    return problem.cases(entry, function)


def _memory(problem: Problem, entry: peers.Entry, case: Case, device: str, seconds: float) -> Row:
    """Return the peak of a step above the gradients that it leaves, and these gradients, in MiB."""
    if case.before:
        case.before()
    gradient, peaks = problem.made(entry), []
    # The lesser of two readings, unless a step is slow: freed memory that was not yet returned makes one too high.
    for _ in range(2 if seconds < 0.2 else 1):
        problem.clear()
        peaks.append(peak_bytes(case.run, device))
    found = [peak for peak in peaks if peak is not None]
    return {"gradient_mib": gradient, "peak_mib": min(found) / MIB - gradient} if found else {}

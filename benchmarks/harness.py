"""What every subject shares: interleaved rounds, peaks of memory, and a point's rows made of checked, timed cases."""

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
from pytest_benchmark.stats import Stats
from torch import Tensor

import fastpref
from benchmarks import machine, peers
from benchmarks.store import Row, Rows
from fastpref.cli import memory
from fastpref.cli.check.allowance import ulp

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOCATORS = {"default": {}, "THP": {"THP_MEM_ALLOC_ENABLE": "1"}}
MIB = 2**20
# An answer so many times further off than eager's own is wrong, and not timed.
WRONG = 10
# A call shorter than this is timed several times over.
SHORTEST = 1e-3

# A GPU's inputs take turns until so many bytes lie between two uses of one: several times its last cache.
ROTATED = 256 * MIB
PART = 2**24  # numbers

Say = Callable[..., None]


def turns(nbytes: int, device: str) -> int:
    """How many copies of inputs of so many bytes take turns, so that no cache holds one until its next."""
    return max(1, math.ceil(ROTATED / nbytes)) if device == "cuda" else 1


def furthest(found: Tensor, truth: Tensor) -> float:
    """The largest absolute difference, a part at a time because float64 is wide; NaN if any is."""
    parts = zip(found.flatten().split(PART), truth.flatten().split(PART), strict=True)
    return torch.stack([(f.double() - t).abs().max() for f, t in parts]).max().item()


def ulps(truth: Tensor, dtype: torch.dtype) -> float:
    """Four spacings of `dtype` at the largest magnitude."""
    return 4 * ulp(dtype, truth.abs().max().item())


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        rounds: over all rows of a point; None for as many as fit into `seconds`, and 5 at least.
        seconds: for the rounds of a point.
        peers: parts of names, of which a peer's must hold one; None for all of them, () for none.
        peer_file: a Python file with more of them.
        without: rows that have ended their process before.
    """

    rounds: int | None = None
    seconds: float = 4.0
    peers: tuple[str, ...] | None = None
    peer_file: Path | None = None
    without: dict[str, str] = field(default_factory=dict)

    def chosen(self, entries: list[peers.Entry]) -> list[peers.Entry]:
        """Ours, and the peers that are asked for."""
        wanted = self.peers
        return [
            entry for entry in entries
            if entry.ours or wanted is None or any(part.lower() in entry.name.lower() for part in wanted)
        ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is timed, and what is done before every timing of it that is not."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None

    def seconds(self, cuda: bool, calls: int = 1) -> float:
        """One timing: of a call, or of the mean of several."""
        if not cuda:
            start = time.perf_counter()
            for _ in range(calls):
                self.run()
            return (time.perf_counter() - start) / calls
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # launches queue up behind it, so that the device does not wait for Python
        begin.record()
        for _ in range(calls):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


def interleaved(
    cases: dict[Any, Case], cuda: bool, rounds: int | None, seconds: float, say: Say
) -> dict[Any, list[float]]:
    """Seconds of every round of every case, after one round that is not counted, and the check before that.

    Every round is in an order of its own: what a case leaves behind in the allocator and the operating system is the
    next one's to pay, and must not always fall to the same.
    """
    names, order = list(cases), random.Random(0)
    calls = dict.fromkeys(names, 1)
    found: dict[Any, list[float]] = {name: [] for name in names}
    number, last = -1, rounds or math.inf
    while number < last:
        start = time.perf_counter()
        # All of them now and not each before its own timing, which would then find its logits in the cache.
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
    """Bytes that a call has at most beyond what is there before it, of ours none kept from earlier calls."""
    fastpref.release_memory()
    return memory.peak_bytes(run, torch.device(device))


def statistics_of(seconds: list[float]) -> Row:
    """Median, quartiles and minimum in milliseconds, as pytest-benchmark has them."""
    stats = Stats()
    for taken in seconds:
        stats.update(1e3 * taken)
    return {
        "ms": stats.median, "ms_q1": stats.q1, "ms_q3": stats.q3, "ms_min": stats.min, "rounds": stats.rounds,
    }  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """A row that does no more than a step must: what others are held against.

    Attributes:
        case: what is timed.
        gbytes: what it moves.
        gflops: what it computes.
    """

    case: Case
    gbytes: float
    gflops: float = 0.0


class Problem(Protocol):
    """One point of a subject: its inputs, the float64 answer, and what a step of an entry is."""

    def check(self, entry: peers.Entry, function: Callable[..., Any]) -> tuple[Row, list[tuple[float, float]]]:
        """An entry's errors as fields of its row; and each of them beside what is allowed."""
        ...

    def cases(self, entry: peers.Entry, function: Callable[..., Any]) -> dict[str, Case]:
        """Pass -> what is timed of an entry; the whole step first."""
        ...

    def floors(self) -> dict[str, Floor]:
        """Rows that are nobody's."""
        ...

    def work(self, name: str, which: str) -> tuple[float, float, str]:
        """Of an entry's pass: GB it must move, GFLOP it must compute, and the name of its floor."""
        ...

    def made(self, entry: peers.Entry) -> float:
        """MiB of gradients that a step leaves, which are no overhead."""
        ...

    def clear(self) -> None:
        """Drop the gradients that a step has left."""
        ...

    def settle(self) -> None:
        """Drop the answers, and whatever a check has left."""
        ...


class NotHereError(RuntimeError):
    """An entry that this machine cannot run."""


def verdict_of(met: BaseException) -> str:
    """What a row without figures is: of a peer that is not here, or of one that failed."""
    return "absent" if isinstance(met, (NotHereError, ModuleNotFoundError)) else "failed"


def reason(met: BaseException) -> str:
    """An exception in one line."""
    if isinstance(met, NotHereError):
        return str(met)
    lines = str(met).strip().splitlines()
    return " ".join([type(met).__name__, *(line.strip() for line in lines[-1:])])[:200]


def judged(entry: peers.Entry, errors: list[tuple[float, float]]) -> str:
    """Whether an answer is within what is allowed; raises where it is wrong, or ours and beyond."""
    worst = max((off / limit if math.isfinite(off) else math.inf for off, limit in errors), default=0.0)
    if worst <= 1:
        return "within"
    if entry.ours or worst > WRONG:
        said = ", ".join(f"{off:.1e} (allowed {limit:.1e})" for off, limit in errors)
        raise ValueError(f"wrong, and not timed: off by {said}")
    return "beyond"


Names = tuple[str, str]  # a row's, and its pass


def measured(problem: Problem, entries: list[peers.Entry], device: str, options: Options, say: Say) -> Rows:
    """A point's rows: loaded and checked, timed in turn, then their memory. What cannot be is a row that says why.

    `say("on", name)` comes before an entry is touched, so that one which ends the process is known.
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
                torch.cuda.synchronize()  # an error that stays with the device ends the process, and this entry's row
            continue
        for which, case in timed.items():
            cases[entry.name, which], rows[entry.name, which] = case, dict(row)
    say("on", "")
    problem.settle()
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
    """What is to be timed of an entry, by pass; its errors go to its row. Raises where it cannot run, or is wrong."""
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
    """What a step has at most, and what of it stays as gradients."""
    if case.before:
        case.before()
    gradient, peaks = problem.made(entry), []
    # Of two readings the lesser, unless they take long: what was freed and not given back makes one too high.
    for _ in range(2 if seconds < 0.2 else 1):
        problem.clear()
        peaks.append(peak_bytes(case.run, device))
    found = [peak for peak in peaks if peak is not None]
    return {"gradient_mib": gradient, "peak_mib": min(found) / MIB - gradient} if found else {}

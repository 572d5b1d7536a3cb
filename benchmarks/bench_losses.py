"""Losses and what they are made of, a subject at a time: ours, the forms in use, and what moving the bytes takes.

    python benchmarks/bench_losses.py     # every subject, under both allocators
    pytest benchmarks/bench_losses.py     # the same rows for pytest-benchmark, under the allocator it starts with

Every row is held against float64 before it is timed. Every round takes all of a subject's rows, in an order of its own,
so that a drift of the machine's speed reaches all of them alike.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

import fastpref
from benchmarks import harness, peers
from benchmarks.harness import ALLOCATORS, Case, Rows, child, interleaved

OURS = "fastpref"


@dataclass(frozen=True)
class Subject:
    """`rows(device, rounds)` checks and times, and fills `COLUMNS`; `verdict(rows)` says what they show."""

    name: str
    rows: Callable[[str, int], Rows]
    verdict: Callable[[Rows], list[str]]


def timed(rows: dict[str, dict[str, Any]], cases: dict[str, Case], device: str, rounds: int) -> None:
    """Add to each row its rounds' median, least and most in milliseconds, and the ratio of its median to ours."""
    seconds = interleaved(cases, rounds, device == "cuda")
    ours = statistics.median(seconds[OURS])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rows[name] |= {"ms": 1e3 * median, "ms_min": 1e3 * min(taken), "ms_max": 1e3 * max(taken)}
        rows[name]["over_ours"] = median / ours


# Generalised advantage estimation.

B, T = 512, 2048
GAMMA, LAM = 1.0, 0.95
TARGET = 20
LOOP, TRL = "Python loop over T", "TRL's loop"
MASKS = ("ragged ends", "holes too")
Advantages = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _trl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The form that TRL's PPO trainer had inline, to 1.12: zeros beyond the end, every column, no hole stepped over."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    last: Tensor | float = 0.0
    reverse = []
    for t in range(T - 1, -1, -1):
        following = values[:, t + 1] if t < T - 1 else 0.0
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        reverse.append(last)
    advantages = torch.stack(reverse[::-1], 1)
    return advantages, advantages + values


GAE: dict[str, Advantages] = {
    OURS: lambda *given: fastpref.gae(*given, gamma=GAMMA, lam=LAM),
    LOOP: lambda *given: fastpref.reference.gae(*given, gamma=GAMMA, lam=LAM),
    TRL: _trl_loop,
}


def gae_inputs(kind: str, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and values (B, T), float32; answers of T/4 to T tokens, less a tenth where there are holes."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, B, T, generator=generator)
    mask = torch.arange(T) < torch.randint(T // 4, T + 1, (B, 1), generator=generator)
    if kind == "holes too":
        mask &= torch.rand(B, T, generator=generator) < 0.9
    return rewards.to(device), values.to(device), mask.to(device)


class Gate:
    """The float64 answer on given inputs, and how far from it a row may be: 2 × the float32 loop's error + 4 ulp."""

    def __init__(self, given: tuple[Tensor, Tensor, Tensor]) -> None:
        self.given = given
        rewards, values, mask = given
        self.truth = GAE[LOOP](rewards.double(), values.double(), mask)
        self.limit = [
            2 * error + 4 * torch.finfo(torch.float32).eps * 2.0 ** math.floor(math.log2(truth.abs().max().item()))
            for error, truth in zip(self.errors(GAE[LOOP]), self.truth, strict=True)
        ]

    def errors(self, function: Advantages) -> list[float]:
        mask = self.given[2]
        pairs = zip(function(*self.given), self.truth, strict=True)
        return [(found.double() - truth).masked_fill(~mask, 0).abs().max().item() for found, truth in pairs]

    def check(self, function: Advantages) -> dict[str, float]:
        """A row's errors, as its fields; raises where one is above its limit."""
        errors = self.errors(function)
        for name, error, limit in zip(("advantages", "returns"), errors, self.limit, strict=True):
            if not error <= limit:
                raise ValueError(f"{name} off by {error:.1e}, more than {limit:.1e}: not timed")
        return {"error_advantages": errors[0], "error_returns": errors[1]}


def gae_floor(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two passes that read what must be read, but for the mask, and write what must be written."""
    return rewards + values, rewards - values


def gae_rows(device: str, rounds: int) -> Rows:
    """Ours, the loops and the floor, for both masks."""
    found = []
    for kind in MASKS:
        given = gae_inputs(kind, device)
        gate = Gate(given)
        names = [name for name in GAE if name != TRL or kind == "ragged ends"]
        rows: dict[str, dict[str, Any]] = {name: gate.check(GAE[name]) for name in names}
        cases = {name: Case(lambda function=GAE[name], given=given: function(*given)) for name in names}
        rows["r + v, r − v"], cases["r + v, r − v"] = {}, Case(lambda given=given: gae_floor(*given))
        timed(rows, cases, device, rounds)
        found += [{"name": name, "mask": kind, "shape": f"{B}×{T}", **row} for name, row in rows.items()]
    return found


def gae_verdict(rows: Rows) -> list[str]:
    """Ours against the loop, for every mask and allocator."""
    lines = []
    for row in rows:
        if row["name"] in (LOOP, TRL):
            ratio, where = row["over_ours"], f"{row['mask']}, {row.get('allocator', row['device'])}"
            target = ""
            if row["name"] == LOOP and row["mask"] == "ragged ends" and row["device"] == "cpu":
                target = f" (target >= {TARGET}): {'met' if ratio >= TARGET else 'missed'}"
            lines.append(f"gae, {where}: {row['name']} over fastpref: {ratio:.1f}{target}")
    return lines


SUBJECTS = (Subject("gae", gae_rows, gae_verdict),)

# Heading, field, how it is written.
COLUMNS = (
    ("", "name", "{}"), ("subject", "subject", "{}"), ("shape", "shape", "{}"), ("mask", "mask", "{}"),
    ("allocator", "allocator", "{}"), ("ms", "ms", "{:.2f}"), ("× ours", "over_ours", "{:.2f}"),
    ("error of advantages", "error_advantages", "{:.1e}"), ("of returns", "error_returns", "{:.1e}"),
)  # fmt: skip


def measured(name: str, device: str, rounds: int) -> Rows:
    """A subject's rows and what they depend on; on the CPU, meant for a process of its own."""
    subject = next(subject for subject in SUBJECTS if subject.name == name)
    known = {"device": device, "rounds": rounds, **peers.provenance()}
    return [{"subject": name, **row, **known} for row in subject.rows(device, rounds)]


def cpu_rows(rounds: int, console: Console) -> Rows:
    """Every subject under every allocator, each in a process of its own."""
    found: Rows = []
    for allocator, environment in ALLOCATORS.items():
        for subject in SUBJECTS:
            console.print(f"[dim]{subject.name}, {allocator} allocator")
            with child(environment) as pool:
                rows = pool.submit(measured, subject.name, "cpu", rounds).result()
            found += [{**row, "allocator": allocator} for row in rows]
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder for the CSV and the markdown table")] = Path("benchmarks/results"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all rows of a subject")] = 15,
) -> None:
    """Measure on this machine's CPU, and on its GPU where there is one."""
    console = Console(width=None if sys.stdout.isatty() else 160)

    def report(rows: Rows, title: str, path: Path) -> None:
        notes = [
            line
            for subject in SUBJECTS
            for line in subject.verdict([row for row in rows if row["subject"] == subject.name])
        ]
        harness.show(rows, COLUMNS, notes, title, console)
        harness.write(rows, COLUMNS, notes, path, title)

    report(cpu_rows(rounds, console), f"Losses, {torch.get_num_threads()} threads", out / "losses")
    if torch.cuda.is_available():
        rows = [row for subject in SUBJECTS for row in measured(subject.name, "cuda", rounds)]
        report(rows, f"Losses, {torch.cuda.get_device_name()}", out / "losses_gpu")


@pytest.fixture(scope="module", params=MASKS)
def gae_gate(request: pytest.FixtureRequest) -> Gate:
    return Gate(gae_inputs(request.param))


@pytest.mark.parametrize("name", [OURS, LOOP])
def test_gae(name: str, gae_gate: Gate, benchmark: Any) -> None:
    benchmark.extra_info.update(gae_gate.check(GAE[name]))
    benchmark.pedantic(GAE[name], gae_gate.given, rounds=10, warmup_rounds=2)


def test_gae_of_trl(benchmark: Any) -> None:
    gate = Gate(gae_inputs("ragged ends"))
    benchmark.extra_info.update(gate.check(GAE[TRL]))
    benchmark.pedantic(GAE[TRL], gate.given, rounds=10, warmup_rounds=2)


if __name__ == "__main__":
    typer.run(main)

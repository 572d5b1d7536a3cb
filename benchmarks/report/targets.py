"""What was aimed at before it was measured, beside what was: met or not, the same list each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks import bench_linear, bench_logprobs, bench_trainers
from benchmarks.report.data import Machine, fastest, one
from benchmarks.store import Row, Rows

BOTH = "forward + backward"


@dataclass(frozen=True)
class Target:
    """A figure that was aimed at.

    Attributes:
        what: of what, in words.
        value: the figure measured.
        limit: what it was to be.
        least: whether it was to be at least that, not at most.
        unit: after the figure.
    """

    what: str
    value: float
    limit: float
    least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        aimed = f"{'≥' if self.least else '≤'} {self.limit:g}{self.unit}"
        return f"{self.what}: {self.value:.3g}{self.unit} (aimed at {aimed}): {'met' if self.met else 'missed'}"


def base(machine: Machine, subject: str, axes: Row, allocator: str = "default") -> Rows:
    """The timed rows of a subject at its base, whole steps only."""
    rows = machine.timed(subject=subject, allocator=allocator, sweep=None, **axes)
    return [row for row in rows if row.get("pass") != "forward"]


def _named(rows: Rows, name: str) -> Row | None:
    return one(row for row in rows if row["name"] == name)


def _ratio(rows: Rows, slower: Row | None, name: str) -> Iterator[float]:
    faster = _named(rows, name)
    if slower is not None and faster is not None:
        yield slower["ms"] / faster["ms"]


def _logprobs(machine: Machine) -> Iterator[Target]:
    for dtype, least in (("fp32", (4, 7)), ("bf16", (2.5, 3))):
        rows = base(machine, "logprobs", {**bench_logprobs.BASE, "dtype": dtype})
        peer = fastest(rows)
        for name, limit in zip(("fastpref", "fastpref, in place"), least, strict=True):
            for value in _ratio(rows, peer, name):
                yield Target(
                    f"{name}, {dtype}, as fast as the fastest peer ({peer and peer['name']})", value, limit, True, "×"
                )
            row = _named(rows, name)
            if row is not None and "peak_mib" in row:
                yield Target(f"{name}, {dtype}, beyond logits and gradient", row["peak_mib"], 16, False, " MiB")


def _linear(machine: Machine) -> Iterator[Target]:
    axes = bench_linear.BASE
    trl = "TRL chunked log-probs, scored rows"
    for dtype, over_trl, over_eager in (("fp32", 3, 3), ("bf16", 5, 2.5)):
        rows = base(machine, "linear", {**axes, "dtype": dtype})
        for peer, limit in ((trl, over_trl), ("eager", over_eager)):
            for value in _ratio(rows, _named(rows, peer), bench_linear.SAVE.name):
                yield Target(f"fastpref, save, {dtype}, as fast as {peer}", value, limit, True, "×")
        for entry, limit in ((bench_linear.SAVE, 400), (bench_linear.RECOMPUTE, 100), (bench_linear.DPO, 100)):
            row = _named(rows, entry.name)
            if row is not None and "peak_mib" in row:
                beyond = row["peak_mib"] - row["buffer_mib"]
                yield Target(f"{entry.name}, {dtype}, beyond gradients and their sums", beyond, limit, False, " MiB")
        wide = base(machine, "linear", {**axes, "dtype": dtype, **bench_linear.WIDE})
        for entry, floor in (
            (bench_linear.SAVE, bench_linear.SIX),
            (bench_linear.DPO, bench_linear.SIX),
            (bench_linear.RECOMPUTE, bench_linear.EIGHT),
        ):
            for value in _ratio(wide, _named(wide, entry.name), floor):
                what = f"{entry.name}, {dtype}, H={bench_linear.WIDE['H']}, times the {floor}"
                yield Target(what, value, 1.3, False, "×")


def _losses(machine: Machine) -> Iterator[Target]:
    rows = machine.timed(subject="losses", loss="gae", allocator="default", sweep=None)
    for value in _ratio(rows, _named(rows, "Python loop over T"), "fastpref"):
        yield Target("gae, as fast as the Python loop", value, 20, True, "×")


def _trainers(machine: Machine) -> Iterator[Target]:
    for V, faster in ((32768, 3), (131072, 4)):
        for dtype in ("fp32", "bf16"):
            rows = longest(machine.timed(subject="trainers", allocator="default", V=V, dtype=dtype))
            trl = _named(rows, bench_trainers.TRL)
            for name in (bench_trainers.PATCHED, bench_trainers.LEAN, bench_trainers.FAST):
                row = _named(rows, name)
                if trl is None or row is None:
                    continue
                label = f"{name}, V={V}, {dtype}"
                yield Target(f"{label}, as fast as TRL", trl["ms"] / row["ms"], faster, True, "×")
                yield Target(f"{label}, of TRL's memory", row["peak_mib"] / trl["peak_mib"], 0.25, False)
                yield Target(f"{label}, off its loss over {row['steps']} steps", row["off_curve"], 1e-5, False)


def longest(rows: Rows) -> Rows:
    """Of runs of several lengths, the longest."""
    steps = max((row["steps"] for row in rows), default=0)
    return [row for row in rows if row["steps"] == steps]


SUBJECTS: dict[str, Callable[[Machine], Iterator[Target]]] = {
    "logprobs": _logprobs, "linear": _linear, "losses": _losses, "trainers": _trainers,
}  # fmt: skip


def targets(machine: Machine, subject: str) -> list[Target]:
    """A subject's, that this machine has figures of; what was aimed at is a CPU's."""
    return list(SUBJECTS[subject](machine)) if machine.device == "cpu" and subject in SUBJECTS else []

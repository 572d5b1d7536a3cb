"""How time and memory grow with each size, fitted, beside how the formulas say they do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.report.data import Machine
from benchmarks.store import Row, Rows

# A fitted exponent so far above its formula's is within what a shared machine's noise makes of one.
NOISE = 0.1
# Below these a size is mostly the price of a call, or of a page, and says nothing of growth.
LEAST = {"ms": 1.0, "peak_mib": 4.0}  # two of the pages of 2 MiB that memory comes in


@dataclass(frozen=True)
class Law:
    """What a formula says of one row's growth with one axis.

    Attributes:
        subject, name, sweep: which rows.
        of: the axis that is swept; "scored" for the number of scored rows N.
        time: the exponent of the time: 1 for what is proportional to it.
        memory: that of the memory beyond operands and gradients, or None where nothing is kept to speak of.
        loss: which loss, where the subject is losses.
    """

    subject: str
    name: str
    sweep: str
    of: str
    time: float
    memory: float | None
    loss: str | None = None


LAWS = (
    Law("logprobs", "fastpref", "V", "V", 1, 0),
    Law("logprobs", "fastpref", "N", "scored", 1, 1),
    Law("logprobs", "fastpref, in place", "V", "V", 1, 0),
    Law("logprobs", "fastpref, in place", "N", "scored", 1, 1),
    *(Law("linear", f"fastpref, {mode}", sweep, of, 1, memory) for mode, by in (
        # Exponentials are N × V; a tile and a chunk are of one size, and rows have a few numbers each.
        ("save", {"V": 1, "N": 1}), ("recompute", {"V": 0, "N": 1}), ("linear_dpo_loss", {"V": 1, "N": 1}),
    ) for sweep, of, memory in (("V", "V", by["V"]), ("N", "scored", by["N"]))),
    Law("losses", "fastpref", "T", "T", 1, 1, "gae"),
    Law("losses", "fastpref", "K", "K", 2, 2, "ranking_loss"),
    Law("losses", "fastpref", "K", "K", 2, 2, "plackett_luce_loss"),  # a sum over ranks of sums over those below
    Law("losses", "fastpref", "K", "K", 1, 1, "linear_preference_loss"),
)  # fmt: skip


def series(machine: Machine, law: Law) -> Rows:
    """A law's rows, by size."""
    where = {} if law.loss is None else {"loss": law.loss}
    rows = machine.timed(subject=law.subject, name=law.name, sweep=law.sweep, **where)
    rows = [row for row in rows if row.get("pass") != "forward" or law.loss == "gae"]
    return sorted(rows, key=lambda row: row[law.of])


def exponent(rows: Rows, of: str, field: str) -> tuple[float, int] | None:
    """The slope of log `field` over log size by least squares, and of how many points; None of fewer than three."""
    points = [(math.log(row[of]), math.log(row[field])) for row in rows if row.get(field, 0) >= LEAST[field]]
    if len(points) < 3:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread, len(points)


@dataclass(frozen=True)
class Fit:
    """A law and what was found: each exponent with its number of points, or None where too few were large enough."""

    law: Law
    sizes: tuple[float, float]
    time: tuple[float, int] | None
    memory: tuple[float, int] | None
    largest: Row

    def faster(self, found: tuple[float, int] | None, law: float | None) -> bool:
        """Whether an exponent is above its formula's."""
        return found is not None and law is not None and found[0] > law + NOISE


def fits(machine: Machine) -> list[Fit]:
    """Every law that this machine has rows of."""
    found = []
    for law in LAWS:
        rows = series(machine, law)
        if len(rows) >= 3:
            time, memory = (exponent(rows, law.of, field) for field in ("ms", "peak_mib"))
            found.append(Fit(law, (rows[0][law.of], rows[-1][law.of]), time, memory, rows[-1]))
    return found

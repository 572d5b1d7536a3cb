"""Read the CSV files of results and select rows from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.store import Row, Rows

STATIC = "static_roofline"


@dataclass(frozen=True)
class Machine:
    """One machine and the CSV file of its rows."""

    path: Path

    @cached_property
    def rows(self) -> Rows:
        """All rows."""
        return store.read(self.path)

    @property
    def name(self) -> str:
        """The name of the machine, as its rows state it."""
        return self.rows[0]["machine"]

    @property
    def device(self) -> str:
        """Either "cpu" or "cuda"."""
        return self.rows[0]["device"]

    def timed(self, **where: Any) -> Rows:
        """Return the rows with a time and with these values; None matches a row without the field."""
        return [r for r in self.rows if "ms" in r and all(r.get(field) == value for field, value in where.items())]

    def steps(self, **where: Any) -> Rows:
        """Return the rows of `timed` that measure a whole step, not its forward alone."""
        return [row for row in self.timed(**where) if row.get("pass") != "forward"]


def machines(folder: Path) -> list[Machine]:
    """Return every machine with results, first the one whose figures the documents show: the CPU with most rows."""
    found = [Machine(path) for path in sorted(folder.glob("*.csv")) if path.stem != STATIC]
    return sorted(
        (machine for machine in found if machine.rows), key=lambda machine: (machine.device, -len(machine.rows))
    )


def ours(row: Row) -> bool:
    """Return whether a row measures fastpref."""
    return row["package"] == "fastpref"


def peer(row: Row) -> bool:
    """Return whether a row measures another library."""
    return row["package"] not in ("fastpref", "floor")


def fastest(rows: Rows) -> Row | None:
    """Return the row of the fastest peer."""
    return min((row for row in rows if peer(row)), key=lambda row: row["ms"], default=None)


def longest(rows: Rows) -> Rows:
    """Return the rows of the run with the most steps, of trainers that ran for different numbers of steps."""
    steps = max((row["steps"] for row in rows), default=0)
    return [row for row in rows if row["steps"] == steps]

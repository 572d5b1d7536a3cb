"""Rows as the report takes them: of one machine, picked by what they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.store import Row, Rows

STATIC = "static_roofline"


@dataclass(frozen=True)
class Machine:
    """One file of results."""

    path: Path

    @cached_property
    def rows(self) -> Rows:
        """All of its rows."""
        return store.read(self.path)

    @property
    def name(self) -> str:
        """In words."""
        return self.rows[0]["machine"]

    @property
    def device(self) -> str:
        """What was measured of it."""
        return self.rows[0]["device"]

    @property
    def digest(self) -> str:
        """Of what its pictures are drawn from."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def pick(self, **where: Any) -> Rows:
        """The rows that have these values; None is for a row without the field."""
        return [row for row in self.rows if all(row.get(field) == value for field, value in where.items())]

    def timed(self, **where: Any) -> Rows:
        """Those of them that have a time."""
        return [row for row in self.pick(**where) if "ms" in row]


def machines(folder: Path) -> list[Machine]:
    """Every machine that has results, a CPU's before a GPU's."""
    found = [Machine(path) for path in sorted(folder.glob("*.csv")) if path.stem != STATIC]
    return sorted((machine for machine in found if machine.rows), key=lambda machine: machine.device)


def one(rows: Iterable[Row]) -> Row | None:
    """The only row, or None."""
    found = list(rows)
    return found[0] if len(found) == 1 else None


def ours(row: Row) -> bool:
    """Whether a row is of this library."""
    return row["package"] == "fastpref"


def peer(row: Row) -> bool:
    """Whether a row is of another."""
    return row["package"] not in ("fastpref", "floor")


def fastest(rows: Rows) -> Row | None:
    """The fastest peer that is right."""
    return min((row for row in rows if peer(row)), key=lambda row: row["ms"], default=None)

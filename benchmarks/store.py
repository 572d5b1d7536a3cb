"""Read and write the results of a machine: one CSV file, one row per measurement, rewritten after every shape."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = list[Row]

# The columns that identify a point, which is a shape measured in one run.
POINT = (
    "subject",
    "device",
    "allocator",
    "sweep",
    "loss",
    "dtype",
    "B",
    "T",
    "V",
    "H",
    "K",
    "masked",
    "logits",
    "steps",
)
# Every column in the order of the file, and the type of its values.
FIELDS: dict[str, type] = {
    "subject": str,
    "name": str,
    "package": str,
    "version": str,
    "pass": str,
    "device": str,
    "allocator": str,
    "sweep": str,
    "loss": str,
    "dtype": str,
    "B": int,
    "T": int,
    "V": int,
    "H": int,
    "K": int,
    "masked": float,
    "logits": str,
    "steps": int,
    "ranks": int,
    "scored": int,
    "gate": str,
    "error": float,
    "error_gradient": float,
    "problem": str,
    "ms": float,
    "ms_q1": float,
    "ms_q3": float,
    "ms_min": float,
    "rounds": int,
    "over_ours": float,
    "gbytes": float,
    "gflops": float,
    "gbytes_per_s": float,
    "gflops_per_s": float,
    "of_floor": float,
    "peak_mib": float,
    "buffer_mib": float,
    "gradient_mib": float,
    "first_loss": float,
    "last_loss": float,
    "off_curve": float,
    "payload_kib": float,
    "expected_kib": float,
    "wire_kib": float,
    "machine": str,
    "commit": str,
    "state": str,
    "cpu": str,
    "threads": str,
    "python": str,
    "torch": str,
    "triton": str,
}


def key(row: Row) -> tuple[str, ...]:
    """Return the point that a row belongs to; a row that was written and read again has the same."""
    return tuple(str(row[axis]) if row.get(axis) not in (None, "") else "" for axis in POINT)


def parse(lines: Iterable[str]) -> Rows:
    """Return the rows of the lines of a file, without the fields that are empty."""
    return [
        {name: FIELDS[name](text) for name, text in line.items() if text not in ("", None)}
        for line in csv.DictReader(lines)
    ]


def read(path: Path) -> Rows:
    """Return the rows of a file, or none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return parse(file)


def write(path: Path, rows: Rows) -> None:
    """Replace a file whole; if writing fails, it stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(FIELDS), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
    os.replace(beside, path)


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


class Results:
    """The results of one machine, in memory and in its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path)

    def holds(self, point: tuple[str, ...], state: str, names: Iterable[str]) -> bool:
        """Return whether all entries in `names` were measured at a point with this state of code and machine."""
        found = {row["name"] for row in self.rows if key(row) == point and row["state"] == state}
        return bool(found) and found.issuperset(names)

    def replace(self, point: tuple[str, ...], rows: Rows) -> None:
        """Replace the rows of a point, in the file too."""
        before = [i for i, row in enumerate(self.rows) if key(row) == point]
        at = before[0] if before else len(self.rows)
        kept = [row for row in self.rows if key(row) != point]
        self.rows = [*kept[:at], *rows, *kept[at:]]
        write(self.path, self.rows)

"""A machine's results: one CSV, a row a measurement, rewritten whole after every point so that nothing is lost."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = list[Row]

# What makes a point: two rows that agree in these are of one run.
POINT = (
    "subject", "device", "allocator", "sweep", "loss", "dtype", "B", "T", "V", "H", "K", "masked", "logits", "steps",
)  # fmt: skip
# Every column, in the file's order, and what its text stands for.
FIELDS: dict[str, type] = {
    "subject": str, "name": str, "package": str, "version": str, "pass": str, "device": str, "allocator": str,
    "sweep": str, "loss": str, "dtype": str, "B": int, "T": int, "V": int, "H": int, "K": int, "masked": float,
    "logits": str, "steps": int, "ranks": int, "scored": int,
    "gate": str, "error": float, "error_gradient": float, "problem": str,
    "ms": float, "ms_q1": float, "ms_q3": float, "ms_min": float, "rounds": int, "over_ours": float,
    "gbytes": float, "gflops": float, "gbytes_per_s": float, "gflops_per_s": float, "of_floor": float,
    "peak_mib": float, "buffer_mib": float, "gradient_mib": float,
    "first_loss": float, "last_loss": float, "off_curve": float,
    "payload_kib": float, "expected_kib": float, "wire_kib": float,
    "machine": str, "commit": str, "state": str, "cpu": str, "threads": str, "python": str, "torch": str,
    "triton": str,
}  # fmt: skip


def key(row: Row) -> tuple[str, ...]:
    """What point a row is of, the same before and after it was a line of a file."""
    return tuple(str(row[axis]) if row.get(axis) not in (None, "") else "" for axis in POINT)


def parse(lines: Iterable[str]) -> Rows:
    """Return the rows of a file's lines; fields that a row has not are left out."""
    return [
        {name: FIELDS[name](text) for name, text in line.items() if text not in ("", None)}
        for line in csv.DictReader(lines)
    ]


def read(path: Path) -> Rows:
    """Return the rows of a file, and none of one that is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return parse(file)


def write(path: Path, rows: Rows) -> None:
    """Replace a file, or leave it as it was."""
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
    """What is known of one machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path)

    def holds(self, point: tuple[str, ...], state: str, names: Iterable[str]) -> bool:
        """Whether all of these were measured at a point, at this state of code and machine."""
        found = {row["name"] for row in self.rows if key(row) == point and row["state"] == state}
        return bool(found) and found.issuperset(names)

    def replace(self, point: tuple[str, ...], rows: Rows) -> None:
        """Put a point's rows in the place of those it had, in the file too."""
        before = [i for i, row in enumerate(self.rows) if key(row) == point]
        at = before[0] if before else len(self.rows)
        kept = [row for row in self.rows if key(row) != point]
        self.rows = [*kept[:at], *rows, *kept[at:]]
        write(self.path, self.rows)

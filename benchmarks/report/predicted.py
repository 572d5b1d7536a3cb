"""Tables of what `benchmarks/static_roofline.py` predicts from machine code."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.report import data
from benchmarks.report.tables import table

Rows = list[dict[str, str]]


def read(folder: Path) -> Rows:
    """Return the rows of the last prediction; none where there was none."""
    path = folder / f"{data.STATIC}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def everything(rows: Rows) -> str:
    """Every kernel on every target."""
    headings = [
        "", "target", "instructions", "ALU", "special", "B read", "written", "registers", "spills", "programs",
        "KB in flight", "barriers", "bound", "waves", *_numbers_of_rows(rows),
    ]  # fmt: skip
    lines = [
        [
            *(f"{row['name']}: {row['kernel']}", row["target"]),
            *(f"{float(row[name]):.1f}" for name in ("instructions", "alu", "special", "load_bytes", "store_bytes")),
            *(row["registers"], row["spills"], row["programs"], _kilobytes(row), row["barriers"], row["bound"]),
            _waves(row),
            *_shares(row),
        ]
        for row in rows
    ]
    return table(headings, lines)


def logits(rows: Rows) -> str:
    """Kernels on logits of the H200."""
    return _of_h200([row for row in rows if row["dtype"] == "bfloat16"], "instructions per bfloat16 logit")


def tiles(rows: Rows) -> str:
    """Kernels on a tile of products of the H200."""
    return _of_h200([row for row in rows if row["dtype"] == "float32"], "instructions per float32 logit")


def _of_h200(rows: Rows, instructions: str) -> str:
    rows = [row for row in rows if row["target"] == "sm_90"]
    if not rows:
        return "Not predicted yet.\n"
    headings = ["", instructions, "programs", "KB in flight", "barriers", "bound", "waves", *_numbers_of_rows(rows)]
    lines = [
        [
            *(f"{row['name']}: {row['kernel']}", f"{float(row['instructions']):.1f}", row["programs"]),
            *(_kilobytes(row), row["barriers"], row["bound"], _waves(row), *_shares(row)),
        ]
        for row in rows
    ]
    of = f"{rows[0]['machine']}, {rows[0]['target']}, Triton {rows[0]['triton']}"
    return f"**Predicted from machine code; unmeasured on a GPU.** {of}.\n\n{table(headings, lines)}"


def _numbers_of_rows(rows: Rows) -> list[str]:
    return [f"N = {rows[0]['rows']}", "512", "64"]


def _shares(row: dict[str, str]) -> list[str]:
    shares = (row["predicted"], row["predicted_512"], row["predicted_64"])
    return ["" if share == "nan" else f"{float(share):.0%}" for share in shares]


def _waves(row: dict[str, str]) -> str:
    return "" if row["waves"] == "nan" else f"{float(row['waves']):.1f}"


def _kilobytes(row: dict[str, str]) -> str:
    return f"{int(row['in_flight']) / 1024:.0f}"

"""Format what `benchmarks/static_roofline.py` predicts from machine code as Markdown tables."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.report import data
from benchmarks.report.tables import table

Rows = list[dict[str, str]]


def read(folder: Path) -> Rows:
    """Return the rows of the last prediction, or none if there was none."""
    path = folder / f"{data.STATIC}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def everything(rows: Rows) -> str:
    """Return every kernel on every target."""
    headings = ["", "target", "instructions", "ALU", "special", "B read", "written", "registers", "spills"]
    counts = ("instructions", "alu", "special", "load_bytes", "store_bytes")
    lines = [
        [
            *(f"{row['name']}: {row['kernel']}", row["target"]),
            *(f"{float(row[name]):.1f}" for name in counts),
            *(row["registers"], row["spills"], *_launch(row)),
        ]
        for row in rows
    ]
    return table([*headings, *_headings(rows)], lines, left=2)


def logits(rows: Rows) -> str:
    """Return the kernels that read logits, on an H200."""
    return _of_h200([row for row in rows if row["dtype"] == "bfloat16"], "instructions per bfloat16 logit")


def tiles(rows: Rows) -> str:
    """Return the kernels that read a tile of products, on an H200."""
    return _of_h200([row for row in rows if row["dtype"] == "float32"], "instructions per float32 logit")


def _of_h200(rows: Rows, instructions: str) -> str:
    rows = [row for row in rows if row["target"] == "sm_90"]
    if not rows:
        return "Not predicted yet.\n"
    lines = [[f"{row['name']}: {row['kernel']}", f"{float(row['instructions']):.1f}", *_launch(row)] for row in rows]
    title = f"{rows[0]['machine']}, {rows[0]['target']}, Triton {rows[0]['triton']}."
    text = table(["", instructions, *_headings(rows)], lines)
    return f"**Predicted from machine code; not measured on a GPU.** {title}\n\n{text}"


def _headings(rows: Rows) -> list[str]:
    return ["programs", "KB in flight", "barriers", "bound", "waves", f"N = {rows[0]['rows']}", "512", "64"]


def _launch(row: dict[str, str]) -> list[str]:
    waves = "" if row["waves"] == "nan" else f"{float(row['waves']):.1f}"
    shares = [row[name] for name in ("predicted", "predicted_512", "predicted_64")]
    predicted = ["" if share == "nan" else f"{float(share):.0%}" for share in shares]
    return [row["programs"], f"{int(row['in_flight']) / 1024:.0f}", row["barriers"], row["bound"], waves, *predicted]

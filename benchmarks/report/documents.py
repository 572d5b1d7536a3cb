"""Draw the pictures and write the tables of every document: `fastpref bench --report`."""

from __future__ import annotations

import runpy
from pathlib import Path

from benchmarks import machine
from benchmarks.report import plots

DOCS = machine.ROOT / "docs"
PICTURES = DOCS / "assets" / "benchmarks"


def write(results: Path) -> None:
    """Draw every picture, and replace the tables of every document by those of the results in a folder."""
    plots.draw(results, PICTURES)
    runpy.run_path(str(DOCS / "tables.py"))["write"](results)

"""Turn the results into `docs/benchmarks.md` with its pictures, and the tables of the README and the other pages."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path

from benchmarks import machine
from benchmarks.report import data, page, plots, predicted

DOCS = machine.ROOT / "docs"
PICTURES = DOCS / "assets" / "benchmarks"


def text(results: Path) -> str:
    """Return the text of the page."""
    return page.page(data.machines(results), predicted.read(results))


def pictures(results: Path) -> dict[Path, str]:
    """Every picture the page shows, and the digest of what it is to be drawn from."""
    found = {
        PICTURES / f"{machine.path.stem}-{name}.png": machine.digest
        for machine in data.machines(results)
        for name in plots.wanted(machine)
    }
    static = results / f"{data.STATIC}.csv"
    if static.exists():
        found[PICTURES / "static-roofline.png"] = hashlib.sha256(static.read_bytes()).hexdigest()[:16]
    return found


def write(results: Path) -> None:
    """Write the page, its pictures, and every table that another page has of them."""
    wanted = pictures(results)
    for path in PICTURES.glob("*.png"):
        if path not in wanted:
            path.unlink()
    for found in data.machines(results):
        plots.draw(found, PICTURES)
    rows = predicted.read(results)
    if rows:
        path = PICTURES / "static-roofline.png"
        plots.save(plots.static(rows), path, wanted[path])
    (DOCS / "benchmarks.md").write_text(text(results))
    for path, updated in tables_of_documents().items():
        path.write_text(updated)


def tables_of_documents() -> dict[Path, str]:
    """Return the text of every document with generated tables, as `docs/tables.py` makes it."""
    module = runpy.run_path(str(DOCS / "tables.py"))
    return {path: module["updated"](path) for path in module["FILES"]}

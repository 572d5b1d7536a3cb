"""Writes the tables that documents hold between two comments, from where their rows are stated.

Those of losses, in the README and `losses.md`, from `fastpref.losses`; that of `compatibility.md` from its tests; that
of `scaling.md` from what was measured.

python docs/tables.py
"""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path
from typing import Any

from fastpref.losses import RLHF, TABLE, Entry, Loss

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "tests" / "fastpref" / "test_compatibility.py"


def _call(entry: Entry) -> str:
    kind = entry.options.get("loss_type") if isinstance(entry, Loss) else None
    return f"`{entry.function.__name__}`" if kind is None else f'`dpo_loss(loss_type="{kind}")`'


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _paper(entry: Entry) -> str:
    return f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})"


def names() -> str:
    """Name, paper and meaning of every loss."""
    lines = ["| loss | paper | meaning |", "|---|---|---|"]
    lines += [f"| {_call(entry)} | {_paper(entry)} | {_cell(entry.meaning)} |" for entry in (*TABLE, *RLHF)]
    return "\n".join(lines) + "\n"


def formulas() -> str:
    """Formula, derivative and options of every loss."""
    lines = ["| loss | of one element | partial derivatives | options |", "|---|---|---|---|"]
    for loss in TABLE:
        takes = ", ".join(f"`{name}`" for name in loss.takes)
        lines.append(f"| {_call(loss)} | {_cell(loss.formula)} | {_cell(loss.derivative)} | {takes} |")
    lines += ["", "| of PPO | of one token | paper |", "|---|---|---|"]
    lines += [f"| {_call(entry)} | {_cell(entry.formula)} | {_paper(entry)} |" for entry in RLHF]
    return "\n".join(lines) + "\n"


def load(path: Path) -> Any:
    """The module in a file that no package holds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compatibility() -> str:
    """What was tried, a table a section, and what came of it with every kind of function."""
    tests = load(CELLS)
    lines: list[str] = []
    for section, rows in tests.SECTIONS.items():
        lines += [f"## {section}", "", f"| | {' | '.join(tests.COLUMNS)} |", "|---" * (1 + len(tests.COLUMNS)) + "|"]
        lines += [f"| {row.what} | {' | '.join(map(_cell, row.verdicts()))} |" for row in rows]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def scaling() -> str:
    """What one rank and two take for each form of a step, as it was measured."""
    heading = ("", "dtype", "ms, one rank", "two", "KiB given to all-reduces", "on the wire", "MiB, one rank", "two")
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "scaling.csv").read_text().splitlines()))
    for one in (row for row in rows if row["ranks"] == "1"):
        (two,) = (row for row in rows if row["ranks"] == "2" and all(row[k] == one[k] for k in ("name", "dtype")))
        fields = [(row, "ms") for row in (one, two)] + [(two, "payload_kib"), (two, "wire_kib")]
        fields += [(row, "peak_mib") for row in (one, two)]
        cells = [one["name"], one["dtype"], *(f"{float(row[field]):.0f}" for row, field in fields)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# What is made of which table, and the table's name in the comments around it.
FILES = {
    ROOT / "README.md": ("losses", names),
    ROOT / "docs" / "losses.md": ("losses", formulas),
    ROOT / "docs" / "compatibility.md": ("compatibility", compatibility),
    ROOT / "docs" / "scaling.md": ("scaling", scaling),
}


def updated(path: Path) -> str:
    """A file's text with its table as it is now."""
    name, make = FILES[path]
    begin, end = f"<!-- {name}: made by docs/tables.py -->", f"<!-- end of {name} -->"
    text = path.read_text()
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if len(re.findall(pattern, text, re.DOTALL)) != 1:
        raise ValueError(f"{path} must hold one table, between {begin!r} and {end!r}")
    return re.sub(pattern, lambda _: f"{begin}\n\n{make()}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in FILES:
        path.write_text(updated(path))

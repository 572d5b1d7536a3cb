"""One page of what `benchmarks/gpu.sh` found: python -m benchmarks.report.summary DIR."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import bench_linear, bench_logprobs
from benchmarks.report import data, page, plots, tables

ENDED = {0: "passed", 77: "not here", 124: "out of time", 130: "out of time", 137: "out of time"}


def _parts(folder: Path) -> list[list[str]]:
    lines = []
    for line in (folder / "statuses.txt").read_text().splitlines():
        name, status, seconds = line.split()
        lines.append(
            [name, ENDED.get(int(status), f"**failed** (status {status})"), f"{seconds} s", _detail(folder, name)]
        )
    return lines


def _detail(folder: Path, part: str) -> str:
    """A part's own last word."""
    if part == "tests" and (folder / "tests.txt").exists():
        return next(iter((folder / "tests.txt").read_text().strip().splitlines()[-1:]), "")
    if part == "check" and (found := _json(folder / "check.json")):
        cases = found["cases"]
        wrong = [case["case"] for case in cases if not case["ok"]]
        return f"{len(cases) - len(wrong)} of {len(cases)} within what is allowed" + (
            f"; not {', '.join(wrong)}" if wrong else ""
        )
    if part == "sanitizer" and (folder / "sanitizer.txt").exists():
        lines = (folder / "sanitizer.txt").read_text().splitlines()
        return "; ".join(
            line.strip("= ") for line in lines if line.startswith("-- ") or "SUMMARY" in line or "not here" in line
        )
    return ""


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # its part was ended before it had written it
        return None


def summary(folder: Path) -> str:
    """The page."""
    text = ["# What was found\n", tables.table(["part", "", "took", ""], _parts(folder))]
    for machine in data.machines(folder):
        text.append(f"## {machine.name}\n")
        for subject, axes in (("logprobs", bench_logprobs.AXES), ("linear", bench_linear.AXES)):
            for name, rows in page.shapes(machine, subject, axes).items():
                text += [f"**{subject}: {name}**\n", tables.full(rows)]
        text += [tables.losses(machine), tables.absent(machine)]
    return "\n".join(part for part in text if part)


def main(folder: str) -> None:
    """Write summary.md and at most two pictures, and show the page."""
    out = Path(folder)
    (out / "summary.md").write_text(summary(out))
    (out / "statuses.txt").unlink()
    for machine in data.machines(out):
        for path in plots.draw(machine, out)[2:]:
            path.unlink()
    print((out / "summary.md").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

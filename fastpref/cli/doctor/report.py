"""Show the sections as tables with the findings below, or as one object for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpref.cli.doctor.section import Finding, Section


def show(sections: Sequence[Section], console: Console) -> None:
    """Print a table of every section that has facts, then the findings."""
    for section in sections:
        if section.facts:
            console.print(_table(section))
    found = [finding for section in sections for finding in section.findings]
    for finding in found:
        _print(finding, console)
    errors = sum(finding.is_error for finding in found)
    console.print(f"{errors} to fix." if errors else "Nothing is missing.")


def _table(section: Section) -> Table:
    nested = [value for value in section.facts.values() if isinstance(value, dict)]
    columns = tuple(nested[0]) if nested else ("",)
    table = Table(title=section.title, title_justify="left", title_style="bold", show_header=bool(nested))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    for name, value in section.facts.items():
        cells = value.values() if isinstance(value, dict) else (value,)
        table.add_row(escape(name), *("none" if cell is None else escape(str(cell)) for cell in cells))
    return table


def _print(finding: Finding, console: Console) -> None:
    colour, kind = ("red", "missing") if finding.is_error else ("yellow", "note")
    lines = [f"[{colour}]{kind}[/{colour}]  {escape(finding.what)}", f"  costs  {escape(finding.costs)}"]
    if finding.fix:
        lines.append(f"  fix    {escape(finding.fix)}")
    for line in lines:
        # Lines are not wrapped, so that a command can be copied.
        console.print(line, highlight=False, soft_wrap=True)


def as_object(sections: Sequence[Section]) -> dict[str, Any]:
    """Return all sections and findings in a form that JSON can hold."""
    found = [finding for section in sections for finding in section.findings]
    return {
        "ok": not any(finding.is_error for finding in found),
        "sections": {section.title: section.facts for section in sections},
        "findings": [asdict(finding) for finding in found],
    }

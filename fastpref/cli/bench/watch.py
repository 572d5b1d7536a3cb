"""Show a run of the suite: a progress bar, a table for every shape, and a summary with the failures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# The heading of a column, the field of a row, and its format.
COLUMNS = (
    ("", "name", "{}"),
    ("pass", "pass", "{}"),
    ("ranks", "ranks", "{}"),
    ("ms", "ms", "{:.4g}"),
    ("quartiles", "ms_q1", "{:.4g}"),
    ("", "ms_q3", "{:.4g}"),
    ("× ours", "over_ours", "{:.2f}"),
    ("of the floor", "of_floor", "{:.0%}"),
    ("GB/s", "gbytes_per_s", "{:.1f}"),
    ("GFLOP/s", "gflops_per_s", "{:.0f}"),
    ("MiB", "peak_mib", "{:.1f}"),
    ("error", "error", "{:.1e}"),
    ("of gradients", "error_gradient", "{:.1e}"),
    ("gate", "gate", "{}"),
)


class Screen:
    """Show a run on the terminal; implements `benchmarks.suite.Watch`."""

    def __init__(self, points: int) -> None:
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = 200
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("", total=points)
        self._start = self._begun = time.monotonic()
        self._name, self._kept = "", 0
        self._failed: list[tuple[bool, str]] = []

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def point(self, point: Any, kept: bool) -> None:
        """Show that a shape begins; `kept` tells whether its results are kept from an earlier run."""
        self._name, self._kept, self._begun = str(point), self._kept + kept, time.monotonic()
        self._progress.update(self._task, description=self._name)

    def said(self, kind: str, value: Any) -> None:
        """Show what is done: an entry is checked, its memory is measured, or a round has ended."""
        doing = f"round {value}" if kind == "round" else value
        self._progress.update(self._task, description=f"{self._name}: {doing}" if doing else self._name)

    def rows(self, point: Any, rows: list[dict[str, Any]]) -> None:
        """Print the table of a shape, and below it the entries without figures."""
        self._progress.advance(self._task)
        used = [column for column in COLUMNS if any(column[1] in row for row in rows if "ms" in row)]
        table = Table(title=f"{point}, in {time.monotonic() - self._begun:.0f} s", title_justify="left")
        for heading, field, _ in used:
            table.add_column(heading, justify="left" if field in ("name", "pass", "gate") else "right", no_wrap=True)
        for row in rows:
            if "ms" in row:
                table.add_row(*(form.format(row[field]) if field in row else "" for _, field, form in used))
        if table.row_count:
            self.console.print(table)
        absent = [f"{row['name']} ({row['problem']})" for row in rows if row["gate"] == "absent"]
        if absent:
            self.console.print(f"[dim]not installed: {escape(', '.join(absent))}", highlight=False)
        for row in rows:
            if row["gate"] == "failed":
                line = escape(f"{row['name']}: {row['problem']}")
                self.console.print(f"[red]failed[/]: {line}", highlight=False)
                self._failed.append((row["package"] == "fastpref", f"{point}: {line}"))

    def interrupted(self, path: Path) -> None:
        """Print where the results are, after a Ctrl-C."""
        done = int(self._progress.tasks[0].completed)
        self.console.print(f"Interrupted; {done} shapes are in {path}. The same command goes on from there.")

    def summarise(self, path: Path) -> int:
        """Print the failures and the file of the results; return 1 if fastpref failed, else 0."""
        task = self._progress.tasks[0]
        seconds = time.monotonic() - self._start
        shapes = f"{int(task.completed)} shapes in {seconds / 60:.1f} minutes"
        self.console.print(f"{shapes}, {self._kept} of them as they were measured before: {path}")
        for ours, line in self._failed:
            self.console.print(f"[red]{'fastpref failed' if ours else 'failed'}[/]: {line}", highlight=False)
        return int(any(ours for ours, _ in self._failed))

"""Progress bars that show the latest numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

RECENT = 20


class Advance(Protocol):
    """Advances a bar, and shows the mean of the latest values of some numbers."""

    def __call__(self, by: int = 1, **numbers: Sequence[float]) -> None:
        """Advance the bar."""
        ...


class Bars:
    """The progress bars of a run."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self._unfinished: dict[str, str] = {}

    @property
    def current(self) -> str:
        """The current task and its progress as text; after an exception, the task that it ended."""
        return next((f"{name}, {done}" for name, done in self._unfinished.items()), "the start")

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Show a bar named `name` with `total` steps, and yield the function that advances it."""
        task = self._progress.add_task(name, total=total, numbers="")
        done = 0
        self._unfinished[name] = f"0 of {total}"

        def advance(by: int = 1, **numbers: Sequence[float]) -> None:
            nonlocal done
            done += by
            self._unfinished[name] = f"{done} of {total}"
            shown = "  ".join(f"{key} {_recent(values):.3f}" for key, values in numbers.items() if values)
            self._progress.update(task, advance=by, numbers=shown)

        yield advance
        # Not in a `finally`: the task that an exception ended stays the current one.
        del self._unfinished[name]


def _recent(values: Sequence[float]) -> float:
    recent = values[-RECENT:]
    return sum(recent) / len(recent)

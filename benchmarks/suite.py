"""List the subjects and shapes of `fastpref bench`, and measure them; each shape is saved as soon as it is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import bench_linear, bench_logprobs, bench_losses, bench_scaling, bench_trainers, machine, store
from benchmarks.harness import ALLOCATORS, Options
from benchmarks.store import Row, Rows
from benchmarks.worker import PointError, Worker

PRESETS = ("smoke", "default", "full")
MODULES = {
    "logprobs": bench_logprobs,
    "linear": bench_linear,
    "losses": bench_losses,
    "trainers": bench_trainers,
    "scaling": bench_scaling,
}
RESULTS = machine.ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Point:
    """A shape of a subject, whose rows are timed in turn."""

    subject: str
    device: str
    allocator: str
    axes: tuple[tuple[str, Any], ...]

    @property
    def row(self) -> Row:
        """The fields that all of its rows share."""
        return {"subject": self.subject, "device": self.device, "allocator": self.allocator, **dict(self.axes)}

    def __str__(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.axes if name != "dtype")
        return f"{self.subject}: {dict(self.axes).get('dtype', '')} {shape}, {self.allocator} allocator"


class Watch(Protocol):
    """An observer of the progress of a run."""

    def point(self, point: Point, kept: bool) -> None:
        """Called when a point begins; `kept` says that it was measured before."""
        ...

    def said(self, kind: str, value: Any) -> None:
        """Called when an entry begins ("on") or a round ends ("round")."""
        ...

    def rows(self, point: Point, rows: Rows) -> None:
        """Called with the rows of a point, measured now or before."""
        ...


def parse_shapes(text: str) -> dict[str, list[str]]:
    """Parse shapes such as "V=32000,50304 dtype=bf16" into the values of each axis.

    Raises:
        ValueError: the text has another form or names an unknown axis.
    """
    axes: dict[str, list[str]] = {}
    for part in text.split():
        name, equals, values = part.partition("=")
        if not equals or name not in store.POINT or not values:
            raise ValueError(
                f"shapes must be {', '.join(PRESETS)}, or axes such as 'V=32000,50304 dtype=bf16', not {text!r}"
            )
        axes[name] = values.split(",")
    return axes


def points(subject: str, device: str, shapes: str) -> list[Point]:
    """Return the points of a preset, or those of all combinations of the values in `shapes`.

    Axes that `shapes` does not name have the value of the subject's base.

    Raises:
        ValueError: the subject does not have an axis, or an axis cannot take a value.
    """
    module = MODULES[subject]
    if shapes in PRESETS:
        found = list(module.points(shapes, device))
    else:
        given = parse_shapes(shapes)
        allocators = given.pop("allocator", ["default"])
        if unknown := given.keys() - set(module.AXES):
            raise ValueError(f"{subject} has the axes {', '.join(module.AXES)}, not {', '.join(sorted(unknown))}")
        values = [[store.FIELDS[name](value) for value in texts] for name, texts in given.items()]
        found = [
            (allocator, {**module.BASE, **dict(zip(given, chosen, strict=True))})
            for allocator in allocators
            for chosen in itertools.product(*values)
        ]
    if unknown := {allocator for allocator, _ in found} - ALLOCATORS.keys():
        raise ValueError(f"allocators are {', '.join(ALLOCATORS)}, not {', '.join(sorted(unknown))}")
    return [Point(subject, device, allocator, tuple(axes.items())) for allocator, axes in found]


def having(shapes: str) -> list[str]:
    """Return the subjects that have all axes of `shapes`; a preset has every subject."""
    axes = set() if shapes in PRESETS else parse_shapes(shapes).keys() - {"allocator"}
    return [name for name, module in MODULES.items() if axes <= set(module.AXES)]


def run(
    wanted: list[Point], results: store.Results, options: Options, watch: Watch, fresh: bool = False
) -> Iterator[None]:
    """Measure every point that `results` does not hold, save each at once, and yield after each."""
    for allocator in ALLOCATORS:
        with Worker(ALLOCATORS[allocator]) as worker:
            for point in wanted:
                if point.allocator == allocator:
                    _measure(point, worker, results, options, watch, fresh)
                    yield


def _measure(point: Point, worker: Worker, results: store.Results, options: Options, watch: Watch, fresh: bool) -> None:
    key, known = store.key(point.row), machine.provenance(point.device)
    names = [entry.name for entry in options.chosen(MODULES[point.subject].entries(options, dict(point.axes)))]
    if not fresh and results.holds(key, known["state"], names):
        watch.point(point, True)
        watch.rows(point, [row for row in results.rows if store.key(row) == key])
        return
    watch.point(point, False)
    try:
        rows = worker.rows(MODULES[point.subject].measure, dict(point.axes), point.device, options, watch.said)
    except PointError as error:
        rows = [{"name": "fastpref", "package": "fastpref", "gate": "failed", "problem": str(error)}]
    rows = [{**point.row, **row, **known} for row in rows]
    results.replace(key, rows)
    watch.rows(point, rows)


def results_for(device: str, out: Path) -> store.Results:
    """Return the results of this machine in a folder."""
    return store.Results(out / f"{machine.slug(device)}.csv")

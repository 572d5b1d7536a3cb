"""Draw the pictures of `docs/benchmarks.md`, one a subject, so that they can be told apart in grey print."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import bench_trainers
from benchmarks.report import predicted
from benchmarks.report.data import Machine, longest, machines, ours, peer
from benchmarks.store import Rows

# Marker, dash and colour. Lines of fastpref are black and thick; lines of peers differ by marker and dash too.
OURS = [("o", "-", "black"), ("s", "--", "black"), ("D", ":", "black"), ("P", "-.", "black"), ("X", "-", "0.35")]
COLOURS = ("#7a3b00", "#b35900", "#8c8c8c", "#5c7aa8", "#a05c8c", "#6f9e6f", "#b0a000", "#4c4c4c", "#9c9c9c")
PEERS = list(zip("v^x+*<>ph", cycle(("-", "--", ":", "-.")), COLOURS, strict=False))
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 140,
    "legend.frameon": False,
}
PANELS = (("ms", "ms"), ("peak_mib", "MiB"))


def styles(names: list[tuple[str, bool]]) -> dict[str, dict[str, Any]]:
    """Return the style of each line, given its name and whether it is fastpref's."""
    own, others = cycle(OURS), cycle(PEERS)
    found = {}
    for name, is_ours in names:
        marker, dash, colour = next(own if is_ours else others)
        width, size = (2.0, 6) if is_ours else (1.2, 5)
        line = {"marker": marker, "linestyle": dash, "color": colour, "linewidth": width, "markersize": size}
        found[name] = {**line, "label": name}
    return found


def _figure(columns: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6 * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def sweep(rows: Rows, of: str) -> Figure:
    """Plot time and memory of every row against the axis `of`."""
    named = styles(list(dict.fromkeys((row["name"], ours(row)) for row in rows if ours(row) or peer(row))))
    figure, grid = _figure(2, height=3.8)
    for axes, (field, heading) in zip(grid, PANELS, strict=True):
        for name, style in named.items():
            # Less than a page is drawn as 0.1 MiB, since a logarithmic axis has no zero.
            points = [(row[of], max(row[field], 0.1)) for row in rows if row["name"] == name and field in row]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), **style)
        axes.set(xscale="log", yscale="log", xlabel=of, ylabel=heading)
    fixed = [f"{axis} = {rows[0][axis]}" for axis in ("B", "T", "V", "H") if axis != of and axis in rows[0]]
    figure.suptitle(", ".join([rows[0]["dtype"], *fixed]), fontsize=9)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def trainers(rows: Rows) -> Figure:
    """Plot the seconds and the memory of a whole step of each trainer, by vocabulary and dtype."""
    runs = sorted({(row["V"], row["dtype"]) for row in rows}, key=lambda run: (run[0], run[1] != "fp32"))
    figure, grid = _figure(2, height=3.4)
    shades, hatches = ("white", "0.75", "0.5", "black"), ("//", "", "..", "")
    for axes, field, scale, form, heading in (
        (grid[0], "ms", 1e-3, "{:.2f}", "s per step"),
        (grid[1], "peak_mib", 1.0, "{:.0f}", "MiB above the models"),
    ):
        for number, run in enumerate(runs):
            for place, row in enumerate(longest([row for row in rows if (row["V"], row["dtype"]) == run])):
                drawn = {"color": shades[place], "hatch": hatches[place], "edgecolor": "black"}
                named = row["name"] if number == 0 else None
                bar = axes.bar(number + (place - 1.5) * 0.2, row[field] * scale, 0.18, label=named, **drawn)
                axes.bar_label(bar, fmt=form, fontsize=6)
        axes.set_xticks(range(len(runs)), [f"V={V}\n{dtype}" for V, dtype in runs])
        axes.set_ylabel(heading)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(bench_trainers.NAMES), fontsize=7)
    return figure


def static(rows: list[dict[str, str]]) -> Figure:
    """Plot the share of the memory's speed that each kernel is predicted to reach on a large batch, by target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure, grid = _figure(len(targets), height=5.2)
    for axes, target in zip(grid, targets, strict=True):
        found = [row for row in rows if row["target"] == target][::-1]
        for place, row in enumerate(found):
            share, mine = float(row["predicted"]), row["name"].startswith("fastpref")
            drawn = {"color": "black", "hatch": ""} if mine else {"color": "white", "hatch": "//"}
            axes.barh(place, share, edgecolor="black", **drawn)
            axes.annotate(f"{float(row['instructions']):.1f} {row['bound']}", (share + 0.02, place - 0.25), fontsize=6)
        names = [f"{row['name']}: {row['kernel']}" if axes is grid[0] else "" for row in found]
        axes.set_yticks(range(len(found)), names)
        axes.tick_params(axis="y", labelsize=6)
        axes.set(xlim=(0, 1.35), xlabel="predicted share of the memory's speed")
        axes.set_title(f"{target}: {found[0]['machine']}")
    return figure


def figures(results: Path) -> dict[str, Figure]:
    """Return the picture of each subject that a folder has results of, by name."""
    found = {}
    for machine in machines(results)[:1]:
        found = _measured(machine)
    if static_rows := predicted.read(results):
        found["static-roofline"] = static(static_rows)
    return found


def _measured(machine: Machine) -> dict[str, Figure]:
    found = {}
    for name, of, where in (
        ("logprobs", "V", {"subject": "logprobs"}),
        ("linear", "V", {"subject": "linear"}),
        ("gae", "T", {"subject": "losses", "loss": "gae"}),
    ):
        if rows := machine.timed(sweep=of, **where):
            whole = [row for row in rows if row.get("pass") != "forward" or name == "gae"]
            found[name] = sweep([row for row in whole if row["dtype"] == rows[0]["dtype"]], of)
    if rows := machine.timed(subject="trainers", allocator="default"):
        found["trainers"] = trainers(rows)
    return found


def draw(results: Path, folder: Path) -> list[Path]:
    """Write every picture as PNG into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for name, figure in figures(results).items():
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], metadata={"Software": None})
    return written

"""The report's pictures: PNG, readable in grey print, each with a digest of the results that it is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import bench_linear, bench_logprobs, bench_trainers
from benchmarks.report.data import Machine, ours, peer
from benchmarks.report.targets import base, longest
from benchmarks.store import Rows

# Ours are black and filled, peers differ by marker, dash and lightness: in grey none is another.
OURS = [
    ("o", "-", "black"),
    ("s", "--", "black"),
    ("D", ":", "black"),
    ("P", "-.", "black"),
    ("X", (0, (1, 3)), "black"),
]
PEERS = [
    ("v", "-", "#7a3b00"), ("^", "--", "#b35900"), ("x", ":", "#8c8c8c"), ("+", "-.", "#5c7aa8"), ("*", "-", "#a05c8c"),
    ("<", "--", "#6f9e6f"), (">", ":", "#b0a000"), ("p", "-.", "#4c4c4c"), ("h", "-", "#9c9c9c"),
]  # fmt: skip
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 140,
    "legend.frameon": False,
}


def styles(names: list[tuple[str, bool]]) -> dict[str, dict[str, Any]]:
    """Marker, dash and colour of every row, by name and whether it is ours."""
    own, others = cycle(OURS), cycle(PEERS)
    found = {}
    for name, is_ours in names:
        marker, dash, colour = next(own if is_ours else others)
        found[name] = {
            "marker": marker, "linestyle": dash, "color": colour, "linewidth": 2 if is_ours else 1.2,
            "markersize": 6 if is_ours else 5, "label": name,
        }  # fmt: skip
    return found


def _named(rows: Rows) -> dict[str, dict[str, Any]]:
    return styles(list(dict.fromkeys((row["name"], ours(row)) for row in rows if ours(row) or peer(row))))


def save(figure: Figure, path: Path, digest: str) -> None:
    """Write a picture, with what it was drawn from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unsigned: Any = {"Description": digest, "Software": None}
    figure.savefig(path, metadata=unsigned)


def _figure(columns: int, rows: int = 1, height: float = 3.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def roofline(machine: Machine) -> Figure:
    """Useful work over its time, by useful work over useful bytes: every row under the ceilings of its own run."""
    figure, grid = _figure(2, height=4.2)
    for axes, dtype in zip(grid[0], ("fp32", "bf16"), strict=True):
        logits = base(machine, "logprobs", {**bench_logprobs.BASE, "dtype": dtype}) or [
            row for row in machine.timed(subject="logprobs", dtype=dtype, sweep=None) if row.get("pass") != "forward"
        ]
        hidden = base(machine, "linear", {**bench_linear.BASE, "dtype": dtype}) or machine.timed(
            subject="linear", dtype=dtype, sweep=None
        )
        copies = [row["gbytes_per_s"] for row in logits if row["name"] == bench_logprobs.READ_COPY]
        products = [row["gflops_per_s"] for row in hidden if row["name"] == bench_linear.SIX]
        if not copies or not products:
            axes.set_visible(False)
            continue
        bandwidth, rate = copies[0], products[0]
        ridge = rate / bandwidth
        axes.plot([0.1, ridge, 1e4], [0.1 * bandwidth, rate, rate], color="black", linewidth=1)
        axes.annotate(f"read + copy, {bandwidth:.3g} GB/s", (0.12, 0.16 * bandwidth), rotation=38, fontsize=7)
        axes.annotate(f"bare products, {rate:.3g} GFLOP/s", (ridge * 1.2, rate * 1.12), fontsize=7)
        rows = [row for row in (*logits, *hidden) if ours(row) or peer(row)]
        for name, style in _named(rows).items():
            points = [(row["gflops"] / row["gbytes"], row["gflops_per_s"]) for row in rows if row["name"] == name]
            axes.plot(*zip(*points, strict=True), **{**style, "linestyle": "none"})
        axes.set(
            xscale="log", yscale="log", xlabel="flop per byte that must be moved", ylabel="GFLOP/s", title=dtype,
            ylim=(0.02 * bandwidth, 3 * rate),
        )  # fmt: skip
        axes.legend(fontsize=6, loc="lower right")
    return figure


def sweep(machine: Machine, subject: str) -> Figure:
    """Time and memory of every row against V and N."""
    rows = [r for r in machine.timed(subject=subject) if r.get("sweep") in ("V", "N") and r.get("pass") != "forward"]
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    named = _named(rows)
    figure, grid = _figure(2, 2)
    for column, (which, of) in enumerate((("V", "V"), ("N", "scored"))):
        for axes, field, heading in zip(
            grid[:, column], ("ms", "peak_mib"), ("ms", "MiB beyond gradients"), strict=True
        ):
            for name, style in named.items():
                points = sorted(
                    (r[of], max(r[field], 0.1 if field == "peak_mib" else 0))
                    for r in rows if r["sweep"] == which and r["name"] == name and field in r
                )  # fmt: skip
                if points:
                    axes.plot(*zip(*points, strict=True), **style)
            fixed = next((row for row in rows if row["sweep"] == which), None)
            if fixed is not None:
                other = f"N={fixed['scored']}" if which == "V" else f"V={fixed['V']}"
                axes.set_title(f"{fixed['dtype']}, {other}" + (f", H={fixed['H']}" if "H" in fixed else ""))
            axes.set(xscale="log", yscale="log", xlabel="V" if which == "V" else "scored rows N", ylabel=heading)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def trainers(machine: Machine) -> Figure:
    """Seconds of a whole step, and memory above the models, by vocabulary and dtype."""
    rows = machine.timed(subject="trainers", allocator="default")
    runs = sorted({(row["V"], row["dtype"]) for row in rows}, key=lambda run: (run[0], run[1] != "fp32"))
    figure, grid = _figure(2)
    shades = ("white", "0.75", "0.5", "black")
    hatches = ("//", "", "..", "")
    for axes, field, scale, heading in zip(
        grid[0], ("ms", "peak_mib"), (1e-3, 1), ("s a step", "MiB above the models"), strict=True
    ):
        for number, run in enumerate(runs):
            found = longest([row for row in rows if (row["V"], row["dtype"]) == run])
            for place, row in enumerate(found):
                height = row[field] * scale
                drawn = {"color": shades[place], "hatch": hatches[place], "edgecolor": "black"}
                bar = axes.bar(
                    number + (place - 1.5) * 0.2, height, 0.18, label=row["name"] if number == 0 else None, **drawn
                )
                axes.bar_label(bar, [f"{height:.2f}" if scale < 1 else f"{height:.0f}"], fontsize=6)
        axes.set_xticks(range(len(runs)), [f"V={V}\n{dtype}" for V, dtype in runs])
        axes.set_ylabel(heading)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(bench_trainers.NAMES), fontsize=7)
    return figure


def static(rows: list[dict[str, str]]) -> Figure:
    """Plot the share of the memory's speed that each kernel is predicted to reach on a large batch, by target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure, grid = _figure(len(targets), height=5.2)
    for column, (axes, target) in enumerate(zip(grid[0], targets, strict=True)):
        found = [row for row in rows if row["target"] == target][::-1]
        for place, row in enumerate(found):
            mine = row["name"].startswith("fastpref")
            share = float(row["predicted"])
            axes.barh(place, share, color="black" if mine else "white", edgecolor="black", hatch="" if mine else "//")
            axes.annotate(f"{float(row['instructions']):.1f} {row['bound']}", (share + 0.02, place - 0.25), fontsize=6)
        axes.set_yticks(
            range(len(found)),
            [f"{row['name']}: {row['kernel']}" for row in found] if column == 0 else [""] * len(found),
        )
        axes.tick_params(axis="y", labelsize=6)
        axes.set(xlim=(0, 1.35), xlabel="of the memory's speed, predicted", title=f"{target}: {found[0]['machine']}")
    return figure


Picture = Callable[[Machine], Figure]
PICTURES: dict[str, tuple[Picture, Callable[[Machine], Any]]] = {
    "roofline": (roofline, lambda m: m.timed(subject="logprobs", sweep=None) and m.timed(subject="linear", sweep=None)),
    "logprobs": (lambda m: sweep(m, "logprobs"), lambda m: m.timed(subject="logprobs", sweep="V")),
    "linear": (lambda m: sweep(m, "linear"), lambda m: m.timed(subject="linear", sweep="V")),
    "trainers": (trainers, lambda m: m.timed(subject="trainers", allocator="default")),
}


def wanted(machine: Machine) -> list[str]:
    """The pictures that a machine has rows for."""
    return [name for name, (_, rows) in PICTURES.items() if rows(machine)]


def draw(machine: Machine, folder: Path) -> list[Path]:
    """Every picture that a machine has rows for."""
    found = []
    with mpl.rc_context(STYLE):
        for name in wanted(machine):
            found.append(folder / f"{machine.path.stem}-{name}.png")
            save(PICTURES[name][0](machine), found[-1], machine.digest)
    return found

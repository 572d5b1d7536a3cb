"""The report's tables, as Markdown: those of the README, and the longer ones of its own page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import bench_linear, bench_logprobs, bench_trainers
from benchmarks.report import growth
from benchmarks.report.data import Machine, ours, peer
from benchmarks.report.targets import base, longest, targets
from benchmarks.store import Row, Rows


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left and the others to the right; nothing where there are no lines."""
    if not lines:
        return ""
    text = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    text += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join(text) + "\n"


def cell(row: Row | None, field: str | Callable[[Row], float], form: str) -> str:
    """A figure, or nothing where it was not measured."""
    try:
        value = None if row is None else field(row) if callable(field) else row[field]
        if isinstance(value, float) and ".3g}" in form:
            value = float(f"{value:.3g}")  # three digits, and then no exponent
            form = form.replace(".3g}", "g}")
        return "" if value is None else form.format(value)
    except KeyError:
        return ""


def label(row: Row) -> str:
    """A row's name, ours in bold, what is nobody's as a floor."""
    return f"**{row['name']}**" if ours(row) else row["name"] if peer(row) else f"floor: {row['name']}"


def beyond(row: Row) -> float:
    """MiB of a step beyond its gradients and the float32 sums of the head's."""
    return row["peak_mib"] - row.get("buffer_mib", 0.0)


# Heading, field, form; each is a pair of columns, fp32 and bf16.
SUMMARY = (("ms", "ms", "{:.3g}"), ("MiB", beyond, "{:.3g}"), ("error", "error", "{:.0e}"))


def summary(machine: Machine, subject: str, axes: Row, allocator: str = "default") -> str:
    """Both dtypes side by side: time, memory and the error of a value, a row each."""
    rows = {dtype: base(machine, subject, {**axes, "dtype": dtype}, allocator) for dtype in ("fp32", "bf16")}
    names = list(dict.fromkeys(row["name"] for found in rows.values() for row in found))
    headings = ["", *(f"{dtype} {what}" for what, *_ in SUMMARY for dtype in rows)]
    lines = []
    for name in names:
        found = {dtype: next((r for r in rows[dtype] if r["name"] == name), None) for dtype in rows}
        first = next(row for row in found.values() if row is not None)
        cells = [cell(found[dtype], field, form) for _, field, form in SUMMARY for dtype in rows]
        lines.append([label(first), *cells])
    return table(headings, lines)


# What, the formula of its memory, subject, row. N scored rows, V columns, i bytes a number.
MEMORY = (
    ("from logits, `log_softmax` and `gather` in float32", "2 × 4·B·T·V", "logprobs", "log_softmax + gather"),
    ("from logits, fastpref", "nothing that grows with V", "logprobs", "fastpref"),
    ("from logits, `inplace_backward=True`", "nor a gradient beside the logits", "logprobs", "fastpref, in place"),
    ("from hidden states, eager", "3 × 4·B·T·V", "linear", "eager"),
    ("from hidden states, exponentials kept", "no logits: i·N·V, and a tile", "linear", bench_linear.SAVE.name),
    ("from hidden states, made again", "a tile of 1024 × 4096", "linear", bench_linear.RECOMPUTE.name),
)


def memory(machine: Machine) -> str:
    """What a step needs beyond logits, operands and gradients, in float32 at each subject's base."""
    axes = {"logprobs": bench_logprobs.BASE, "linear": bench_linear.BASE}
    lines = []
    for what, formula, subject, name in MEMORY:
        row = next((row for row in base(machine, subject, axes[subject]) if row["name"] == name), None)
        lines.append([what, formula, cell(row, beyond, "{:.3g} MiB")])
    return table(["", "formula", "measured"], lines)


def readme_logprobs(machine: Machine) -> str:
    """From logits."""
    return summary(machine, "logprobs", bench_logprobs.BASE) + "\n" + aims(machine, "logprobs")


def readme_linear(machine: Machine) -> str:
    """From hidden states."""
    return summary(machine, "linear", bench_linear.BASE) + "\n" + aims(machine, "linear")


def trainers(machine: Machine, allocator: str = "default") -> str:
    """A step of each trainer, by vocabulary and dtype."""
    runs = sorted({(row["V"], row["dtype"]) for row in machine.timed(subject="trainers", allocator=allocator)})
    runs.sort(key=lambda run: (run[0], run[1] != "fp32"))
    headings = [
        "V",
        "dtype",
        "",
        "s a step",
        "× as fast",
        "MiB above the models",
        "of TRL's",
        "off TRL's loss by",
        "steps",
    ]
    lines = []
    for V, dtype in runs:
        rows = longest(machine.timed(subject="trainers", allocator=allocator, V=V, dtype=dtype))
        trl = next(row for row in rows if row["name"] == bench_trainers.TRL)
        lines += [
            [
                str(V), {"bf16": "bf16 autocast"}.get(dtype, dtype), label(row), f"{row['ms'] / 1e3:.2f}",
                f"{trl['ms'] / row['ms']:.1f}", f"{row['peak_mib']:.0f}", f"{row['peak_mib'] / trl['peak_mib']:.2f}",
                "" if row is trl else f"{row['off_curve']:.0e}", str(row["steps"]),
            ]
            for row in rows
        ]  # fmt: skip
    return table(headings, lines)


def readme_trainers(machine: Machine) -> str:
    """A whole step of TRL's DPO."""
    return trainers(machine) + "\n" + aims(machine, "trainers")


def gae(machine: Machine) -> str:
    """GAE beside the loops."""
    return losses(machine, ("gae", "gae with holes")) + "\n" + aims(machine, "losses")


FEW = 4


def aims(machine: Machine, subject: str) -> str:
    """How many of the figures aimed at are met, and those that are not by name, where they are few."""
    found = targets(machine, subject)
    missed = [str(target).removesuffix(": missed") for target in found if not target.met]
    text = f"{len(found) - len(missed)} of {len(found)} figures aimed at are met"
    if len(missed) > FEW:
        return f"{text}; the report has each beside its aim.\n"
    return f"{text}. Missed: {'; '.join(missed)}.\n" if missed else f"{text}.\n"


def aimed(machine: Machine) -> str:
    """Every figure that was aimed at."""
    lines = []
    for subject in ("logprobs", "linear", "losses", "trainers"):
        for target in targets(machine, subject):
            sign = "≥" if target.least else "≤"
            lines.append([
                target.what, f"{target.value:.3g}{target.unit}", f"{sign} {target.limit:g}{target.unit}",
                "met" if target.met else "**missed**",
            ])  # fmt: skip
    return table(["", "measured", "aimed at", ""], lines)


FULL = (
    ("pass", "pass", "{}"), ("ms", "ms", "{:.4g}"), ("first quartile", "ms_q1", "{:.4g}"), ("third", "ms_q3", "{:.4g}"),
    ("× ours", "over_ours", "{:.2f}"), ("of the floor", "of_floor", "{:.0%}"), ("GB/s", "gbytes_per_s", "{:.1f}"),
    ("GFLOP/s", "gflops_per_s", "{:.0f}"), ("MiB", "peak_mib", "{:.1f}"), ("of it fp32 sums", "buffer_mib", "{:.0f}"),
    ("error", "error", "{:.1e}"), ("of gradients", "error_gradient", "{:.1e}"), ("gate", "gate", "{}"),
)  # fmt: skip


def full(rows: Rows) -> str:
    """Every figure of a shape's rows."""
    used = [column for column in FULL if any(cell(row, column[1], column[2]) for row in rows)]
    lines = [[label(row), *(cell(row, field, form) for _, field, form in used)] for row in rows]
    return table(["", *(heading for heading, *_ in used)], lines)


def losses(machine: Machine, names: Sequence[str] | None = None) -> str:
    """Ours beside the formula and the formula compiled, a line a loss."""
    rows = machine.timed(subject="losses", allocator="default", sweep=None)
    found = list(dict.fromkeys(row["loss"] for row in rows)) if names is None else list(names)
    others = list(dict.fromkeys(row["name"] for row in rows if row["loss"] in found and not ours(row)))
    lines = []
    for loss in found:
        by_name: dict[str, Row] = {row["name"]: row for row in rows if row["loss"] == loss}
        mine = by_name.get("fastpref")
        shape = " × ".join(str(mine[axis]) for axis in "BT" if mine and axis in mine)
        theirs = [cell(by_name.get(name), "ms", "{:.3g}") for name in others]
        lines.append([f"`{loss}`", shape, cell(mine, "ms", "{:.3g}"), *theirs, cell(mine, "error", "{:.0e}")])
    return table(["loss", "elements", "**fastpref** ms", *others, "error"], lines)


def scaling(machine: Machine) -> str:
    """One rank and two, of each form of a step."""
    heading = ["", "dtype", "ms, one rank", "two", "KiB given to all-reduces", "on the wire", "MiB, one rank", "two"]
    rows, lines = machine.timed(subject="scaling"), []
    for first in (row for row in rows if row["ranks"] == 1):
        (second,) = (row for row in rows if row["ranks"] == 2 and all(row[k] == first[k] for k in ("name", "dtype")))
        figures: list[Any] = [first["ms"], second["ms"], second["payload_kib"], second["wire_kib"]]
        figures += [first["peak_mib"], second["peak_mib"]]
        lines.append([first["name"], first["dtype"], *(f"{figure:.0f}" for figure in figures)])
    return table(heading, lines)


def grown(machine: Machine) -> str:
    """Fitted exponents beside the formulas'."""
    lines = []
    for fit in growth.fits(machine):
        law = fit.law
        cells = [f"{law.subject}: {law.loss or law.name}", "N" if law.of == "scored" else law.of]
        cells.append(f"{fit.sizes[0]:g}–{fit.sizes[1]:g}")
        for found, expected, field, unit in (
            (fit.time, law.time, "ms", "ms"), (fit.memory, law.memory, "peak_mib", "MiB"),
        ):  # fmt: skip
            shown = "too small" if found is None else f"{found[0]:.2f}"
            verdict = " **faster**" if fit.faster(found, expected) else ""
            cells += [cell(fit.largest, field, "{:.3g} " + unit), f"{shown}{verdict}", f"≤ {expected:g}"]
        lines.append(cells)
    return table(
        ["", "with", "from–to", "time there", "exponent", "formula", "memory there", "exponent", "formula"], lines
    )


def absent(machine: Machine) -> str:
    """Rows without figures, and why: a line each."""
    lines: dict[tuple[str, str, str], int] = {}
    for row in machine.rows:
        if "problem" in row:
            failed = "**failed**: " if row["gate"] == "failed" else ""
            found = (row["subject"], row["name"], failed + row["problem"])
            lines[found] = lines.get(found, 0) + 1
    return table(["subject", "row", "why", "shapes"], [[s, n, w, str(count)] for (s, n, w), count in lines.items()])

"""Format the measured rows of a machine as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import bench_linear, bench_logprobs, bench_trainers
from benchmarks.report.data import Machine, longest, ours, peer
from benchmarks.store import Row, Rows

SUBJECTS = {"logprobs": bench_logprobs, "linear": bench_linear}
Column = tuple[str, str | Callable[[Row], float], str]  # heading, field or function of a row, format


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are left-aligned, or "" if there are no lines."""
    if not lines:
        return ""
    text = [f"| {' | '.join(headings)} |", "|---" * left + "|---:" * (len(headings) - left) + "|"]
    text += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join(text) + "\n"


def cell(row: Row | None, field: str | Callable[[Row], float], form: str) -> str:
    """Return a formatted figure, or "" if it was not measured."""
    try:
        value = None if row is None else field(row) if callable(field) else row[field]
    except KeyError:
        return ""
    if isinstance(value, float) and ".3g}" in form:
        value = float(f"{value:.3g}")  # "g" alone then prints three digits without an exponent
        form = form.replace(".3g}", "g}")
    return "" if value is None else form.format(value)


def label(row: Row) -> str:
    """Return the name of a row: fastpref's in bold, a floor's marked as one."""
    return f"**{row['name']}**" if ours(row) else row["name"] if peer(row) else f"floor: {row['name']}"


def beyond(row: Row) -> float:
    """Return the MiB that a step needs beyond its gradients and the float32 sums of the weight's gradient."""
    return row["peak_mib"] - row.get("buffer_mib", 0.0)


FIGURES: tuple[Column, ...] = (("ms", "ms", "{:.3g}"), ("MiB", beyond, "{:.3g}"), ("error", "error", "{:.0e}"))


def base(machine: Machine, subject: str, dtype: str) -> Rows:
    """Return the rows at the shape that a subject is summed up by."""
    axes = {**SUBJECTS[subject].BASE, "dtype": dtype}
    return machine.steps(subject=subject, allocator="default", sweep=None, **axes)


def headline(machine: Machine) -> str:
    """Return the table of the README: bfloat16 from logits and from hidden states."""
    lines = []
    for subject, title in (("logprobs", "from logits"), ("linear", "from hidden states")):
        rows = [row for row in base(machine, subject, "bf16") if ours(row) or peer(row)]
        for number, row in enumerate(rows):
            figures = (cell(row, field, form) for _, field, form in FIGURES)
            lines.append(["" if number else title, label(row), *figures])
    return table(["", "", *(heading for heading, *_ in FIGURES)], lines, left=2)


def summary(machine: Machine, subject: str) -> str:
    """Return time, memory and error in float32 and bfloat16 at the shape that a subject is summed up by."""
    rows = {dtype: {row["name"]: row for row in base(machine, subject, dtype)} for dtype in ("fp32", "bf16")}
    first = {name: row for found in reversed(rows.values()) for name, row in found.items()}
    lines = [
        [label(row), *(cell(found.get(name), field, form) for _, field, form in FIGURES for found in rows.values())]
        for name, row in first.items()
    ]
    return table(["", *(f"{dtype} {heading}" for heading, *_ in FIGURES for dtype in rows)], lines)


# Each way to compute a result, with the formula of its memory and the row that measures it.
MEMORY = (
    ("from logits, `log_softmax` and `gather` in float32", "2 × 4·B·T·V", "logprobs", "log_softmax + gather"),
    ("from logits, fastpref", "does not grow with V", "logprobs", "fastpref"),
    (
        "from logits, `inplace_backward=True`",
        "does not grow with V, no separate gradient",
        "logprobs",
        "fastpref, in place",
    ),
    ("from hidden states, eager", "3 × 4·B·T·V", "linear", "eager"),
    ('from hidden states, `mode="save"`', "i·N·V of exponentials, and one tile", "linear", bench_linear.SAVE.name),
    ('from hidden states, `mode="recompute"`', "one tile of 1024 × 4096 logits", "linear", bench_linear.RECOMPUTE.name),
)


def memory(machine: Machine) -> str:
    """Return what a float32 step needs beyond logits, operands and gradients."""
    lines = []
    for what, formula, subject, name in MEMORY:
        row = next((row for row in base(machine, subject, "fp32") if row["name"] == name), None)
        lines.append([what, formula, cell(row, beyond, "{:.3g} MiB")])
    return table(["", "formula", "measured"], lines)


FULL: tuple[Column, ...] = (
    ("pass", "pass", "{}"),
    ("ms", "ms", "{:.4g}"),
    ("first quartile", "ms_q1", "{:.4g}"),
    ("third quartile", "ms_q3", "{:.4g}"),
    ("time relative to fastpref", "over_ours", "{:.2f}"),
    ("share of the floor's speed", "of_floor", "{:.0%}"),
    ("MiB", "peak_mib", "{:.1f}"),
    ("of which fp32 sums", "buffer_mib", "{:.0f}"),
    ("error", "error", "{:.1e}"),
    ("error of gradients", "error_gradient", "{:.1e}"),
    ("accuracy", "gate", "{}"),
)


def shapes(machine: Machine, subject: str) -> str:
    """Return a table of each shape and allocator; the sweeps are in the pictures only."""
    found: dict[str, Rows] = {}
    for row in machine.timed(subject=subject, sweep=None):
        axes = ", ".join(f"{axis}={row[axis]}" for axis in SUBJECTS[subject].AXES if axis != "dtype")
        found.setdefault(f"{row['dtype']}, {axes}, {row['allocator']} allocator", []).append(row)
    return "\n".join(f"**{name}**\n\n{_full(rows)}" for name, rows in found.items())


def _full(rows: Rows) -> str:
    """Return a table of every figure, without the columns that are empty and the words that are all the same."""
    used = []
    for heading, field, form in FULL:
        values = {cell(row, field, form) for row in rows if row["package"] != "floor"} - {""}
        if len(values) > (form == "{}"):
            used.append((heading, field, form))
    lines = [[label(row), *(cell(row, field, form) for _, field, form in used)] for row in rows]
    return table(["", *(heading for heading, *_ in used)], lines)


def trainers(machine: Machine, allocator: str = "default") -> str:
    """Return a step of each trainer, by vocabulary and dtype."""
    headings = ["V", "dtype", "", "s per step", "speedup", "MiB", "MiB relative to TRL", "loss difference", "steps"]
    found = machine.timed(subject="trainers", allocator=allocator)
    lines = []
    for V, dtype in sorted({(row["V"], row["dtype"]) for row in found}, key=lambda run: (run[0], run[1] != "fp32")):
        rows = longest([row for row in found if (row["V"], row["dtype"]) == (V, dtype)])
        trl = next(row for row in rows if row["name"] == bench_trainers.TRL)
        for row in rows:
            named = [str(V), {"bf16": "bf16 autocast"}.get(dtype, dtype), label(row)]
            time = [f"{row['ms'] / 1e3:.2f}", f"{trl['ms'] / row['ms']:.1f}"]
            space = [f"{row['peak_mib']:.0f}", f"{row['peak_mib'] / trl['peak_mib']:.2f}"]
            lines.append([*named, *time, *space, "" if row is trl else f"{row['off_curve']:.0e}", str(row["steps"])])
    return table(headings, lines, left=3)


def losses(machine: Machine, advantages: bool = False) -> str:
    """Return the milliseconds of each loss beside those of its formula, or of `gae` beside loops over time."""
    found = machine.timed(subject="losses", allocator="default", sweep=None)
    rows = [row for row in found if row["loss"].startswith("gae") == advantages]
    others = {row["name"]: label(row) for row in rows if not ours(row)}
    lines = []
    for loss in dict.fromkeys(row["loss"] for row in rows):
        by_name: dict[str, Row] = {row["name"]: row for row in rows if row["loss"] == loss}
        mine = by_name.get("fastpref")
        shape = " × ".join(str(mine[axis]) for axis in "BT" if mine and axis in mine)
        theirs = [cell(by_name.get(name), "ms", "{:.3g}") for name in others]
        lines.append([f"`{loss}`", shape, cell(mine, "ms", "{:.3g}"), *theirs, cell(mine, "error", "{:.0e}")])
    return table(["", "shape", "**fastpref**", *others.values(), "error"], lines)


def scaling(machine: Machine) -> str:
    """Return a step on one rank and on two."""
    headings = ["", "dtype", "ms, one rank", "ms, two ranks", "KiB passed to all-reduces", "KiB on the wire"]
    headings += ["MiB, one rank", "MiB, two ranks"]
    rows, lines = machine.timed(subject="scaling"), []
    for first in (row for row in rows if row["ranks"] == 1):
        (second,) = (row for row in rows if row["ranks"] == 2 and all(row[k] == first[k] for k in ("name", "dtype")))
        figures = [first["ms"], second["ms"], second["payload_kib"], second["wire_kib"]]
        figures += [first["peak_mib"], second["peak_mib"]]
        lines.append([first["name"], first["dtype"], *(f"{figure:.0f}" for figure in figures)])
    return table(headings, lines, left=2)


def absent(machine: Machine) -> str:
    """Return the rows without figures and the reason of each."""
    lines: dict[tuple[str, str, str], int] = {}
    for row in machine.rows:
        if "problem" in row:
            failed = "**failed**: " if row["gate"] == "failed" else ""
            found = (row["subject"], row["name"], failed + row["problem"])
            lines[found] = lines.get(found, 0) + 1
    return table(
        ["benchmark", "row", "reason", "shapes"], [[*found, str(count)] for found, count in lines.items()], left=3
    )


def versions(machine: Machine) -> str:
    """Return a sentence that names the machine, the software and the commit."""

    def all_of(field: str) -> str:
        return ", ".join(dict.fromkeys(str(row[field]) for row in machine.rows if field in row))

    packages = {row["package"]: row["version"] for row in machine.rows if "version" in row}
    peers = ", ".join(
        f"{name} {version}"
        for name, version in packages.items()
        if name not in ("fastpref", "torch") and version != "not installed"
    )
    return (
        f"{machine.name} ({all_of('cpu')}), {all_of('threads')} threads, Python {all_of('python')}, torch "
        f"{all_of('torch')}, Triton {all_of('triton')}, {peers}; commit {all_of('commit')}.\n"
    )


def others(machines: Sequence[Machine]) -> str:
    """Return every table of the machines that the rest of the page does not show."""
    if not machines:
        return "No other machine and no GPU has been measured.\n"
    parts = []
    for machine in machines:
        found = [shapes(machine, subject) for subject in SUBJECTS]
        found += [
            losses(machine, advantages=True),
            losses(machine),
            trainers(machine),
            scaling(machine),
            absent(machine),
        ]
        parts.append("\n".join([f"### {machine.name}\n", versions(machine), *filter(None, found)]))
    return "\n".join(parts)

"""The report's page, `docs/benchmarks.md`."""

from __future__ import annotations

from benchmarks import bench_linear, bench_logprobs
from benchmarks.report import plots, predicted, tables
from benchmarks.report.data import Machine
from benchmarks.store import Rows

HEAD = """# Benchmarks

Made by `fastpref bench --report` from the CSVs in `benchmarks/results/`, one a machine, a row a measurement; a test
fails when this page and they differ.

**How it is measured.** Every answer, of ours and of every peer, is held against float64 before it is timed. Allowed is
twice what eager PyTorch loses in the dtype and 4 ulp; ours must lose no more than float32 statistics do, also in bf16,
or the run fails. A peer beyond the first is marked so and timed, one that is ten times beyond, or NaN, is not. All rows
of a shape are timed in turn, every round in an order of its own, after one that does not count; a row's time is
the median of its rounds, with quartiles. On a GPU times are those of events on the device, and inputs that its cache
could hold take turns. A floor is a row as well: the copy of the logits, or the bare products, of the same run. Memory
is the most that a step has beyond what was there before it and beyond the gradients that it leaves. Error is the
largest absolute one of a log-prob or a loss, that of gradients relative to the largest where there are hidden states.

GB/s and GFLOP/s are of the work that has to be done, the same for all rows of a shape: of N scored rows and V columns,
logits are read once in each pass and their whole gradient written once, 6 flop a logit; from hidden states of H
features operands are read once and gradients written once, 6·N·V·H flop. Who does more work shows less of it a second.

```bash
fastpref bench --list                                      # every shape, and none measured
fastpref bench logprobs --shapes "V=32000 dtype=bf16"      # one subject, shapes of your own
fastpref bench linear --peers eager,TRL --shapes full      # some of the peers
fastpref bench --peer-file examples/benchmark_peer.py      # and one of yours
```
"""

STATIC = """## What the machine code says

**Predicted from machine code; unmeasured on a GPU.** The main loop of every kernel on logits is compiled for a target
and disassembled. Instructions and bytes are of a logit; programs and the bytes of loads that they keep in flight are of
a multiprocessor; barriers are of an iteration. "N = 8192" and so on is the share of the memory's speed with that many
rows, predicted as `benchmarks/prediction.py` states; "bound" is what takes longest where programs fill the device, and
"waves" how often they fill it with 8192 rows. A tile is read from memory, even where a cache would hold it.
`make roofline` makes the table.

![Share of the memory's speed that each kernel is predicted to reach, by target](assets/benchmarks/static-roofline.png)

"""


def page(machines: list[Machine], static: list[dict[str, str]]) -> str:
    """The whole page."""
    parts = [HEAD, *(_machine(machine) for machine in machines)]
    if static:
        parts.append(STATIC + predicted.everything(static))
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _picture(machine: Machine, name: str, alt: str) -> str:
    if name not in plots.wanted(machine):
        return ""
    return f"![{alt}](assets/benchmarks/{machine.path.stem}-{name}.png)\n\n"


def _versions(machine: Machine) -> str:
    def all_of(field: str) -> str:
        return ", ".join(dict.fromkeys(str(row[field]) for row in machine.rows if field in row))

    packages = {
        row["package"]: row["version"] for row in machine.rows if row.get("version", "") not in ("", "not installed")
    }
    peers = ", ".join(f"{name} {version}" for name, version in packages.items() if name not in ("fastpref", "torch"))
    return (
        f"{all_of('cpu')}, {all_of('threads')} threads, Python {all_of('python')}, torch {all_of('torch')}, Triton "
        f"{all_of('triton')}; {peers}. Commit {all_of('commit')}, state of code and machine {all_of('state')}.\n"
    )


def _machine(machine: Machine) -> str:
    text = [f"## {machine.name}\n", _versions(machine)]
    if aimed := tables.aimed(machine):
        text += ["### Aimed at, and measured\n", aimed]
    if picture := _picture(machine, "roofline", "Achieved rates under the ceilings of their own run"):
        text += ["### Roofline\n", picture]
    for subject, title, axes in (
        ("logprobs", "From logits", bench_logprobs.AXES), ("linear", "From hidden states", bench_linear.AXES),
    ):  # fmt: skip
        found = shapes(machine, subject, axes)
        if found:
            text += [f"### {title}\n", _picture(machine, subject, f"{title}: time and memory against V and N")]
            for name, rows in found.items():
                text += [f"**{name}**\n", tables.full(rows)]
    if machine.timed(subject="losses"):
        text += ["### Losses\n", LOSSES, tables.losses(machine)]
    if machine.timed(subject="trainers"):
        text += ["### A whole step of TRL's DPO\n", TRAINERS]
        text.append(_picture(machine, "trainers", "Seconds of a step and memory above the models"))
        text += [
            f"**{allocator} allocator**\n\n{tables.trainers(machine, allocator)}"
            for allocator in dict.fromkeys(row["allocator"] for row in machine.timed(subject="trainers"))
        ]
    if machine.timed(subject="scaling"):
        text += ["### A vocabulary over two ranks\n", SCALING, tables.scaling(machine)]
    if grown := tables.grown(machine):
        text += ["### Growth\n", GROWTH, grown]
    if missing := tables.absent(machine):
        text += ["### Without figures\n", missing]
    return "\n".join(part for part in text if part)


LOSSES = """On a CPU a loss is its formula, and what is timed is the price of the checks; `gae` is a scan of its own.
"""

TRAINERS = """Four layers of Llama, H = 256, 976 tokens a step of which half are completion, a reference model, SGD.
Each trainer is a process, and takes its step when it is told to. Memory is what a step has above both models.
"""

SCALING = """Ranks are processes of one thread on this machine, over loopback. What is given to all-reduces must be what
[the formulas](scaling.md#bytes) say, or the run fails.
"""

GROWTH = """Exponents of time and memory beyond gradients over each sweep, by least squares on logarithms, of the points
above 1 ms and 4 MiB; a fit more than 0.1 above its formula is marked. Small sizes are mostly the price of a call, which
makes an exponent less.
"""


def shapes(machine: Machine, subject: str, axes: tuple[str, ...]) -> dict[str, Rows]:
    """Rows by shape and allocator, those of sweeps left to the pictures."""
    found: dict[str, Rows] = {}
    for row in machine.timed(subject=subject, sweep=None):
        shape = ", ".join(f"{axis}={row[axis]}" for axis in axes if axis != "dtype")
        found.setdefault(f"{row['dtype']}, {shape}, {row['allocator']} allocator", []).append(row)
    return found

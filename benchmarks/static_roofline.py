"""A GPU's figure without a GPU: what bounds every kernel on logits, read off its compiled main loop.

Instructions, the operations of the slower pipes and bytes are counted per logit and held against what the machine does
in a second. The prediction takes perfect overlap and enough warps: a kernel may be slower than its bound, never faster.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

from benchmarks import peers, sass
from fastpref_kernels.triton import linear, logprobs

ALL_STATS = 31
DPO_STATS = 14  # entropy, mean_logits, is_top1: what TRL's DPO asks for
TILE = 4096  # columns


@dataclass(frozen=True)
class Machine:
    """A GPU in figures per clock and multiprocessor: lanes that issue, and that each slower pipe executes."""

    name: str
    multiprocessors: int
    clock: float
    issue: int
    alu: int
    fma: int
    special: int
    bandwidth: float  # bytes a second

    def seconds(self, lanes: float, per_clock: int) -> float:
        """Time of `lanes` lane-instructions on a pipe."""
        return lanes / (self.multiprocessors * self.clock * per_clock)


# Rates from the vendors' programming guides and data sheets. The H200's bandwidth is a measured device copy; the others
# are the data sheet's less a tenth. AMD's vector instructions issue on one pipe, which scalar ones do not share.
MACHINES = {
    "sm_80": Machine("A100", 108, 1.41e9, 128, 64, 64, 16, 0.9 * 2.04e12),
    "sm_90": Machine("H200", 132, 1.98e9, 128, 64, 128, 16, 4.3e12),
    "sm_100": Machine("B200", 148, 1.96e9, 128, 64, 128, 16, 0.9 * 8.0e12),
    "gfx942": Machine("MI300X", 304, 2.1e9, 64, 64, 64, 16, 0.9 * 5.3e12),
}


@dataclass(frozen=True)
class Row:
    """One pass over the logits; every figure but the last six is per logit."""

    target: str
    machine: str
    dtype: str
    name: str
    kernel: str
    instructions: float
    alu: float
    special: float
    load_bytes: float
    store_bytes: float
    widest_load: int
    narrowest_load: int
    registers: int
    spills: int
    stack: int
    shared: int
    bound: str
    of_bandwidth: float  # the share of the memory's speed that the bound leaves


def describe(name: str, program: sass.Program, loop: sass.Loop, dtype: torch.dtype) -> Row:
    """Count one loop and find what bounds it."""
    machine = MACHINES[program.target]
    logits = program.logits(loop, dtype.itemsize)
    alu, fma, special = (loop.count(pipe) / logits for pipe in ("alu", "fma", "special"))
    instructions = len(loop.instructions) / logits
    load, store = loop.bytes("load") / logits, loop.bytes("store") / logits
    amd = program.target.startswith("gfx")
    # AMD: a special function holds the vector pipe four times as long, and nothing scalar takes its turn.
    issued = alu + special * machine.issue / machine.special if amd else instructions
    times = {
        "memory": (load + store) / machine.bandwidth,
        "issue": machine.seconds(issued, machine.issue),
        "ALU": 0.0 if amd else machine.seconds(alu, machine.alu),
        "FMA": 0.0 if amd else machine.seconds(fma, machine.fma),
        "special": machine.seconds(special, machine.special),
    }
    bound = max(times, key=lambda pipe: times[pipe])
    widths = loop.widths("load")
    return Row(
        program.target, machine.name, str(dtype).removeprefix("torch."), name, program.name, instructions, alu, special,
        load, store, max(widths), min(widths), program.registers, program.spills, program.stack, program.shared, bound,
        times["memory"] / times[bound],
    )  # fmt: skip


def ours(dtype: torch.dtype, V: int, stats: int) -> None:
    """Launch the forward and the backward as the operators do; with statistics, the entropy has a gradient too."""
    logits, labels = torch.zeros(2, 4, V, dtype=dtype), torch.zeros(2, 4, dtype=torch.int64)
    scoring = (-100, True, 1.0, 1.0, None, "none")
    logps, _, norm, counts, *_ = logprobs.logprobs(logits, labels, None, None, *scoring, stats)
    grad = torch.ones_like(logps)
    saved = (logits, labels, None, None, norm, counts)
    logprobs.write_gradient(torch.empty_like(logits), grad, grad if stats else None, *saved, *scoring)


class Tile(peers.Kernels):
    """Kernels on a tile of products, which are float32 where what was multiplied is shorter."""


def tile(dtype: torch.dtype, stats: int, stored: bool) -> None:
    """Launch the row pass over a tile, storing what the gradients' products need; or, if not, the tile's gradient."""
    products = torch.promote_types(dtype, torch.float32)
    z, targets, label = torch.zeros(8, TILE, dtype=products), torch.zeros(8, dtype=torch.int64), torch.zeros(8)
    out = torch.zeros(8, TILE, dtype=dtype)
    state, (anchors, masses) = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    transform = (1.0, 1.0, None)
    linear.fold(z, None, targets, 0, *transform, stats, state, anchors, masses, out if stored else None)
    if not stored:
        entropy = label if stats else None
        linear.fold_backward(z, None, targets, 0, *transform, torch.zeros(4, 8, dtype=products), label, entropy, out)


KERNELS = (
    peers.Kernels("fastpref", lambda dtype, V, target: ours(dtype, V, 0)),
    peers.Kernels("fastpref, every statistic", lambda dtype, V, target: ours(dtype, V, ALL_STATS)),
    Tile("fastpref tile", lambda dtype, V, target: tile(dtype, 0, stored=False)),
    Tile("fastpref tile, stored", lambda dtype, V, target: tile(dtype, 0, stored=True)),
    Tile("fastpref tile, DPO's statistics", lambda dtype, V, target: tile(dtype, DPO_STATS, stored=False)),
    Tile("fastpref tile, DPO's, stored", lambda dtype, V, target: tile(dtype, DPO_STATS, stored=True)),
    *peers.KERNELS,
)


def rows(target: str, dtype: torch.dtype, V: int, kernels: peers.Kernels) -> Iterator[Row]:
    """Every pass of what `kernels` launches."""
    with sass.compiling(target) as compiled:
        kernels.launch(dtype, V, target)
    if isinstance(kernels, Tile):
        dtype = torch.promote_types(dtype, torch.float32)
    for kernel in compiled:
        program = sass.read(kernel, target)
        for number, loop in enumerate(program.passes[: kernels.passes], 1):
            row = describe(kernels.name, program, loop, dtype)
            yield replace(row, kernel=f"{row.kernel} {number}/{kernels.passes}") if kernels.passes > 1 else row


def attempt(target: str, dtype: torch.dtype, V: int, kernels: peers.Kernels) -> list[Row | tuple[str, str]]:
    """The rows; or, of a peer that is missing or that this Triton cannot compile, its name and the reason."""
    try:
        return list(rows(target, dtype, V, kernels))
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return [(kernels.name, f"{type(error).__name__}: {reason[-1]}")]


def table(target: str, found: list[Row | tuple[str, str]]) -> Table:
    """One target's rows; a pair is a name and why there is no row of it."""
    machine = MACHINES[target]
    result = Table(title=f"{target}: {machine.name}, {machine.bandwidth / 1e12:.1f} TB/s. Per logit, main loop")
    result.add_column("kernel", no_wrap=True)
    for heading in (
        "dtype", "instr.", "ALU", "special", "load B", "store B", "width B", "registers", "spills", "shared B", "bound",
        "of bandwidth",
    ):  # fmt: skip
        result.add_column(heading, justify="right")
    for row in found:
        if isinstance(row, tuple):
            result.add_row(row[0], f"[red]{row[1]}")
            continue
        width = (
            f"{row.widest_load}" if row.widest_load == row.narrowest_load else f"{row.narrowest_load}-{row.widest_load}"
        )
        result.add_row(
            f"{row.name}: {row.kernel}", row.dtype, f"{row.instructions:.1f}", f"{row.alu:.1f}", f"{row.special:.1f}",
            f"{row.load_bytes:.1f}", f"{row.store_bytes:.1f}", width, f"{row.registers}", f"{row.spills}",
            f"{row.shared}", row.bound, f"{row.of_bandwidth:.0%}",
        )  # fmt: skip
    return result


def main(
    target: Annotated[str, typer.Option(help="Comma-separated: " + ", ".join(sass.TARGETS))] = ",".join(sass.TARGETS),
    dtype: Annotated[str, typer.Option(help="Comma-separated torch dtypes")] = "bfloat16",
    vocabulary: Annotated[int, typer.Option(help="V, the length of a row")] = 128256,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the rows here")] = None,
) -> None:
    """Compile every kernel on logits, ours and the installed peers', and say what bounds it."""
    targets, dtypes = target.split(","), [getattr(torch, name) for name in dtype.split(",")]
    if unknown := set(targets) - set(sass.TARGETS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} is none of {', '.join(sass.TARGETS)}")
    # Peers leave it unset, and Triton then warns and fuses.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    console = Console(width=None if sys.stdout.isatty() else 180)
    written: list[Row] = []
    for name in targets:
        found: list[Row | tuple[str, str]] = []
        for kernels in KERNELS:
            for kind in dtypes:
                found += attempt(name, kind, vocabulary, kernels)
        console.print(table(name, found))
        written += (row for row in found if isinstance(row, Row))
    if csv_file is not None:
        csv_file.parent.mkdir(parents=True, exist_ok=True)
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in written)


if __name__ == "__main__":
    typer.run(main)

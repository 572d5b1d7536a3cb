"""Predict from machine code how fast each kernel on logits is on a GPU; no GPU is needed.

Instructions, operations of the slower pipes, bytes, bytes in flight and barriers are counted in the compiled main loop
and compared with what the GPU does in a second. `benchmarks/prediction.py` states the model.
"""

from __future__ import annotations

import csv
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

from benchmarks import flight, peers, sass
from benchmarks.prediction import MACHINES, Pass, Prediction
from fastpref_kernels.contract import STATISTICS, RowSums, Statistic
from fastpref_kernels.triton import launches, linear, logprobs

ALL_STATS = sum(STATISTICS.values())
DPO_STATS = (Statistic.ENTROPY | Statistic.MEAN_LOGITS | Statistic.IS_TOP1).value  # which TRL's DPO trainer asks for
FEW = (512, 64)  # smaller numbers of rows that are predicted too


class Launch(NamedTuple):
    """The programs of a launch, and the logits that each of them reads."""

    programs: int
    logits: float


@dataclass(frozen=True)
class Row:
    """One pass over the logits; instructions, operations and bytes are per logit.

    Attributes:
        programs: the programs that one multiprocessor holds.
        in_flight: the bytes of loads that one multiprocessor can have outstanding in the main loop.
        barriers: the barriers in an iteration of the main loop.
        shuffles: the exchanges between lanes in an iteration.
        bound: what takes longest when programs fill the device; "latency" is the time that one program alone waits.
        of_bandwidth: the share of the memory's speed that is then reached.
        rows: rows of the batch.
        waves: the programs of a launch on `rows` rows, divided by those that the device holds.
        predicted: the share of the memory's speed with `rows` rows; `predicted_512`: with 512; `predicted_64`: with 64.
        bytes_per_second: the bytes that are then read and written per second.
    """

    target: str
    machine: str
    triton: str
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
    programs: int
    in_flight: int
    barriers: int
    shuffles: int
    bound: str
    of_bandwidth: float
    rows: int
    waves: float
    predicted: float
    predicted_512: float
    predicted_64: float
    bytes_per_second: float


def describe(name: str, work: Pass, dtype: torch.dtype, rows: int, sizes: dict[int, Launch]) -> Row:
    """Count one pass and predict its launches on various numbers of rows."""
    program, loop = work.program, work.loop
    logits = program.logits(loop, work.itemsize)
    programs = flight.resident_programs(program)
    full = work.predict(programs * work.machine.multiprocessors, next(iter(sizes.values())).logits)
    predicted = {n: work.predict(launch.programs, launch.logits) for n, launch in sizes.items()}
    missing = Prediction("", math.nan, math.nan)
    widths = loop.widths("load")
    return Row(
        target=program.target,
        machine=work.machine.name,
        triton=triton.__version__,
        dtype=str(dtype).removeprefix("torch."),
        name=name,
        kernel=program.name,
        instructions=len(loop.instructions) / logits,
        alu=loop.count("alu") / logits,
        special=loop.count("special") / logits,
        load_bytes=loop.bytes("load") / logits,
        store_bytes=loop.bytes("store") / logits,
        widest_load=max(widths),
        narrowest_load=min(widths),
        registers=program.registers,
        spills=program.spills,
        stack=program.stack,
        shared=program.shared,
        programs=programs,
        in_flight=flight.bytes_in_flight(program, loop),
        barriers=loop.barriers,
        shuffles=loop.shuffles,
        bound=full.bound,
        of_bandwidth=full.of_bandwidth,
        rows=rows,
        waves=predicted.get(rows, missing).waves,
        predicted=predicted.get(rows, missing).of_bandwidth,
        predicted_512=predicted.get(512, missing).of_bandwidth,
        predicted_64=predicted.get(64, missing).of_bandwidth,
        bytes_per_second=predicted.get(rows, missing).of_bandwidth * work.machine.bandwidth,
    )


@dataclass(frozen=True)
class Case:
    """Kernels that are launched together.

    Attributes:
        name: the name in the table.
        launch: launches the kernels, given the dtype, V, the number of rows and the target.
        passes: how often a kernel reads the logits; each of these main loops is a row.
        rows: the number of rows that `launch` always uses; None if it uses the number it is given.
        tile: whether the kernels read a tile of products, which is float32 or wider.
    """

    name: str
    launch: Callable[[torch.dtype, int, int, str], object]
    passes: int = 1
    rows: int | None = None
    tile: bool = False


def from_logits(stats: int) -> Callable[[torch.dtype, int, int, str], None]:
    """Return a function that launches the forward and backward as the operators do."""

    def launch(dtype: torch.dtype, V: int, rows: int, target: str) -> None:
        # The kernels are only compiled, so this memory is never touched.
        logits, labels = torch.empty(1, rows + 1, V, dtype=dtype), torch.zeros(1, rows + 1, dtype=torch.int64)
        scoring = (-100, True, 1.0, 1.0, None, "none")
        # The number of programs that share a row depends on the number of multiprocessors.
        with mock.patch.object(logprobs, "_multiprocessors", return_value=MACHINES[target].multiprocessors):
            logps, _, norm, counts, *_ = logprobs.logprobs(logits, labels, None, None, *scoring, stats)
            grad = torch.ones_like(logps)
            saved = (logits, labels, None, None, norm, counts)
            logprobs.logprobs_backward(torch.empty_like(logits), grad, grad if stats else None, *saved, *scoring)

    return launch


def tile(stats: int, stored: bool) -> Callable[[torch.dtype, int, int, str], None]:
    """Return a function that launches the fold of a tile, and if it does not store the tile, its gradient as well."""

    def launch(dtype: torch.dtype, V: int, rows: int, target: str) -> None:
        R, C = rows_of_tile(rows), launches.TILE.columns
        products = torch.promote_types(dtype, torch.float32)
        z, targets, label = torch.empty(R, C, dtype=products), torch.zeros(R, dtype=torch.int64), torch.zeros(R)
        out = torch.empty(R, C, dtype=dtype)
        state = RowSums.start((R,), z.device)
        anchors, masses = torch.zeros(2, R, dtype=torch.float64)
        transform = (1.0, 1.0, None)
        linear.fold(z, None, targets, 0, *transform, stats, state, anchors, masses, out if stored else None)
        if not stored:
            entropy = label if stats else None
            linear.fold_backward(
                z, None, targets, 0, *transform, torch.zeros(4, R, dtype=products), label, entropy, out
            )

    return launch


def rows_of_tile(rows: int) -> int:
    """Return the number of rows of a tile in a batch of `rows` rows."""
    return min(rows, launches.TILE.rows)


def peer(kernels: peers.Kernels) -> Case:
    """Return the case of a peer, whose launch always has 8 rows."""
    return Case(kernels.name, lambda dtype, V, _, target: kernels.launch(dtype, V, target), kernels.passes, rows=8)


CASES = (
    Case("fastpref", from_logits(0)),
    Case("fastpref, every statistic", from_logits(ALL_STATS)),
    Case("fastpref tile", tile(0, stored=False), tile=True),
    Case("fastpref tile, stored", tile(0, stored=True), tile=True),
    Case("fastpref tile, DPO's statistics", tile(DPO_STATS, stored=False), tile=True),
    Case("fastpref tile, DPO's, stored", tile(DPO_STATS, stored=True), tile=True),
    *map(peer, peers.KERNELS),
)


def rows_of(target: str, dtype: torch.dtype, V: int, rows: int, case: Case) -> Iterator[Row]:
    """Yield the row of each pass of the kernels that a case launches."""
    kind = torch.promote_types(dtype, torch.float32) if case.tile else dtype
    programs: dict[Any, sass.Program] = {}
    found: dict[Any, dict[int, Launch]] = defaultdict(dict)
    for n in dict.fromkeys((rows, *FEW)):
        with sass.compiling(target) as compiled:
            case.launch(dtype, V, n, target)
        for kernel, count in zip(compiled, compiled.programs, strict=True):
            if kernel not in programs:
                programs[kernel] = sass.read(kernel, target)
            if case.tile:
                found[kernel].setdefault(n, Launch(count, rows_of_tile(n) * launches.TILE.columns / count))
            else:
                launched = case.rows or n
                found[kernel].setdefault(n, Launch(math.ceil(count * n / launched), launched * V / count))
    for kernel, program in programs.items():
        if not any(constant.startswith("BLOCK") for constant in program.constants):
            continue  # the kernel does not read blocks of logits
        for number, loop in enumerate(program.passes[: case.passes], 1):
            row = describe(case.name, Pass(program, loop, kind.itemsize), kind, rows, found[kernel])
            yield replace(row, kernel=f"{row.kernel} {number}/{case.passes}") if case.passes > 1 else row


def attempt(target: str, dtype: torch.dtype, V: int, rows: int, case: Case) -> list[Row] | str:
    """Return the rows of a case, or its name and the reason if it is not installed or does not compile."""
    try:
        return list(rows_of(target, dtype, V, rows, case))
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return f"{case.name}: {type(error).__name__}: {reason[-1]}"


HEADINGS = (
    *("dtype", "instr.", "ALU", "special", "load B", "store B", "width B", "regs", "spills", "shared B", "programs"),
    *("flight KB", "barriers", "shuffles", "bound", "GB/s"),
)


def table(target: str, rows: int, found: list[Row]) -> Table:
    """Return the table of one target."""
    machine = MACHINES[target]
    result = Table(
        title=f"{target}: {machine.name}, {machine.bandwidth / 1e12:.1f} TB/s with {machine.needed / 1024:.0f} KB in "
        f"flight a multiprocessor. Predicted from machine code (Triton {triton.__version__}); not measured on a GPU",
        caption="Instructions, ALU, special and bytes: per logit. Barriers, shuffles: per iteration of the main loop. "
        "N=: the share of the memory's speed with N rows, with tiles read from memory even if a cache could hold them.",
    )
    result.add_column("kernel", no_wrap=True)
    for heading in (*HEADINGS, f"N={rows}", *(f"N={n}" for n in FEW)):
        result.add_column(heading, justify="right")
    for row in found:
        width = (
            f"{row.widest_load}" if row.widest_load == row.narrowest_load else f"{row.narrowest_load}-{row.widest_load}"
        )
        # A kernel may be launched for some numbers of rows only.
        shares = (
            "" if math.isnan(share) else f"{share:.0%}"
            for share in (row.predicted, row.predicted_512, row.predicted_64)
        )
        result.add_row(
            f"{row.name}: {row.kernel}",
            row.dtype,
            *(f"{count:.1f}" for count in (row.instructions, row.alu, row.special, row.load_bytes, row.store_bytes)),
            width,
            *(f"{count}" for count in (row.registers, row.spills, row.shared, row.programs)),
            f"{row.in_flight / 1024:.0f}",
            *(f"{row.barriers}", f"{row.shuffles}", row.bound, f"{row.bytes_per_second / 1e9:.0f}"),
            *shares,
        )
    return result


def main(
    target: Annotated[str, typer.Option(help="Comma-separated: " + ", ".join(sass.TARGETS))] = ",".join(sass.TARGETS),
    dtype: Annotated[str, typer.Option(help="Comma-separated torch dtypes")] = "bfloat16",
    vocabulary: Annotated[int, typer.Option(help="V, the length of a row")] = 128256,
    rows: Annotated[int, typer.Option(help="N, the rows of a batch")] = 8192,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the rows here")] = None,
) -> None:
    """Compile every kernel on logits, of fastpref and the installed peers, and predict how fast it is."""
    targets, dtypes = target.split(","), [getattr(torch, name) for name in dtype.split(",")]
    if unknown := set(targets) - set(sass.TARGETS):
        raise typer.BadParameter(f"--target takes {', '.join(sass.TARGETS)}, not {', '.join(sorted(unknown))}")
    # Peers leave this unset, and Triton then warns.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    console = Console(width=None if sys.stdout.isatty() else 240)
    written: list[Row] = []
    for name in targets:
        results = [attempt(name, kind, vocabulary, rows, case) for case in CASES for kind in dtypes]
        found = [row for result in results if not isinstance(result, str) for row in result]
        console.print(table(name, rows, found))
        for reason in (result for result in results if isinstance(result, str)):
            console.print(f"No row of {reason}")
        written += found
    if csv_file is not None:
        csv_file.parent.mkdir(parents=True, exist_ok=True)
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in written)


if __name__ == "__main__":
    typer.run(main)

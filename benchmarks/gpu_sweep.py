"""Measure the settings that only a GPU can decide, those of most value first, until a deadline.

    python benchmarks/gpu_sweep.py --out DIR [--seconds 200] [--device cuda|cpu] [--only GROUP,...]

Launches, tiles and ways to accumulate are varied one at a time. Each answer is compared with float64 before it is
timed. Each row is appended to DIR/sweep.csv at once, and is not measured again on the same device. At the end, the
three best variants of each kernel and shape are printed beside the current setting. `--device cpu` rehearses the
smallest shapes under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

BEGAN = time.monotonic()  # the deadline includes the imports and the start of the device
ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if TYPE_CHECKING:
    from benchmarks.sweep.case import Case

GROUPS = ("ceilings", "logits", "fold", "step", "products", "few rows", "tile loop", "product_fold", "losses")
# Groups that are timed by the clock, including the host.
WHOLE = ("step", "tile loop", "losses")
PATIENCE = 20.0  # seconds to wait for a kernel to compile


def all_cases(small: bool) -> list[Case]:
    """Return every case, those of the most valuable groups first."""
    from benchmarks.sweep import ceilings, logits, steps, tiles

    cases = [case for module in (ceilings, logits, tiles, steps) for case in module.cases(small)]
    # A failed capture may leave the process unable to run anything else, so graphs come last.
    return sorted(cases, key=lambda case: (case.graph, GROUPS.index(case.group)))


def compile_case(case: Case) -> None:
    """Launch a case's kernels on a few rows of a CPU; see `benchmarks.precompile`."""
    with case.within():
        case.make("cpu", 8).run()


class DeviceLostError(RuntimeError):
    """Raised when a case leaves its device unable to run another.

    Attributes:
        number: the number of the case, from 1.
        seconds: the seconds that were left.
    """

    def __init__(self, number: int, seconds: float) -> None:
        super().__init__(f"case {number} has broken the context of the device")
        self.number, self.seconds = number, seconds


def sweep(
    cases: Sequence[Case],
    device: str,
    out: Path,
    seconds: float,
    compiled: dict[Case, Future[int]] | None = None,
    after: int = 0,
    begin: float | None = None,
) -> int:
    """Measure the cases that the file does not hold until the deadline, and return how many were not reached.

    Args:
        cases: what to measure.
        device: "cuda" or "cpu".
        out: the folder of the file.
        seconds: the time after which no case begins.
        compiled: the compilation to wait for before a case begins.
        after: the number of cases to skip at the beginning.
        begin: the time that the seconds count from, now if None.

    Raises:
        DeviceLostError: an error of a case stays with the device.
    """
    from benchmarks.sweep import rows
    from fastpref.cli.device import works

    begin = time.monotonic() if begin is None else begin
    table = rows.Table(out / "sweep.csv", device)
    for number, case in list(enumerate(cases, 1))[after:]:
        if table.holds(case):
            continue
        if time.monotonic() - begin > seconds:
            return len(cases) - number + 1
        # Compilations in the background would slow down a step, whose time includes the host.
        awaited = (compiled or {}).values() if case.group in WHOLE else [(compiled or {}).get(case)]
        for future in awaited:
            if future is not None:
                with contextlib.suppress(Exception):  # the case compiles it again and reports the error
                    future.result(timeout=min(PATIENCE, max(0.0, seconds - (time.monotonic() - begin))))
        row = rows.measure(case, device, table)
        table.add(row)
        print(f"[{number}/{len(cases)}, {time.monotonic() - begin:.0f} s] {case}: {rows.said(row)}", flush=True)
        if row["status"] != "ok" and not works(device):
            raise DeviceLostError(number, seconds - (time.monotonic() - begin))
    return 0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of sweep.csv")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--after", type=int, default=0, metavar="N", help="leave out the first N cases")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups: {', '.join(GROUPS)}")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if unknown := set(only) - set(GROUPS):
        parser.error(f"--only takes {', '.join(GROUPS)}, not {', '.join(sorted(unknown))}")
    # Triton and cuBLAS read these when they are loaded. The second makes cuBLAS deterministic, as filling outputs with
    # NaN requires.
    os.environ["TRITON_INTERPRET"] = "1" if arguments.device == "cpu" else "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from benchmarks import precompile
    from benchmarks.sweep import rows
    from benchmarks.triton_on_cpu import launchers_on_cpu

    small = arguments.device == "cpu"
    cases = [case for case in all_cases(small) if case.group in only and not (small and case.cuda)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        compiled = {}
        if small:
            stack.enter_context(launchers_on_cpu())
        else:
            ahead = [case for case in cases if case.compiles]
            jobs = [(compile_case, (case,)) for case in ahead]
            futures = stack.enter_context(precompile.compiling_ahead(precompile.target_of("cuda"), jobs))
            compiled = dict(zip(ahead, futures, strict=True))
        left, lost = 0, None
        gc.collect()
        gc.freeze()  # the collection after each case then skips every object that the imports made
        try:
            left = sweep(cases, arguments.device, arguments.out, arguments.seconds, compiled, arguments.after, BEGAN)
        except DeviceLostError as error:
            lost = error
    if lost is not None:
        # A new process has a new context.
        print(f"{lost}: the remaining cases run in another process", flush=True)
        again = ["--out", str(arguments.out), "--device", arguments.device, "--only", arguments.only]
        again += ["--seconds", str(max(lost.seconds, 0.0)), "--after", str(lost.number)]
        os.execv(sys.executable, [sys.executable, __file__, *again])
    table = rows.Table(arguments.out / "sweep.csv", arguments.device)
    print(rows.summary(table.rows))
    if left:
        print(f"{left} of {len(cases)} cases were not reached in {arguments.seconds:.0f} s; the same command goes on")
    return 0 if any(row["status"] == "ok" for row in table.rows) else 1


if __name__ == "__main__":
    sys.exit(main())

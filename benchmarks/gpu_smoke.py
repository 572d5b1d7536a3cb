"""Check each Triton kernel and operator on its own, within a minute, and print a PASS, FAIL or SKIP line for each.

    python benchmarks/gpu_smoke.py [--device cuda|cpu] [--seconds 60] [--only GLOB ...]

Shapes are large enough for the main loops, outputs are filled with NaN beforehand, and answers are compared with
float64 by the rule of `fastpref check`. A case that raises, hangs, or ends or breaks its process gives a FAIL line, and
the remaining cases run in a new process; only the deadline ends the run. `--device cpu` rehearses all of it under
Triton's interpreter. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # The worker's process gets this path too.
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.smoke.worker import Answer, LostError, Worker  # noqa: E402 - found by the path above

# The limit of a case, so that a kernel that hangs does not take the rest of the time.
CASE_SECONDS = {"cuda": 30.0, "cpu": 120.0}


def smoke(
    device: str,
    seconds: float,
    only: Sequence[str] = ("*",),
    *,
    start: Callable[[str], Worker] = Worker,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> Counter[str]:
    """Check the cases that match any of `only` until the deadline, and count them by status.

    Args:
        device: "cuda" or "cpu".
        seconds: the time after which no case begins.
        only: globs of the names of cases.
        start: starts a process for a device.
        clock: returns the time in seconds.
        say: prints a line.
    """
    began = clock()
    counts: Counter[str] = Counter()
    left: list[str] = []
    worker: Worker | None = None
    stack = ExitStack()
    try:
        worker = _started(start, device, say)
        left = [name for name in worker.names if any(fnmatch(name, glob) for glob in only)]
        say(f"{len(left)} cases on {worker.description}")
        if worker.target is not None:
            stack.enter_context(compile_ahead(worker.target, left))
        while left and clock() - began < seconds:
            if worker is None:
                say("its process is lost: the remaining cases run in another")
                worker = _started(start, device, say)
                continue
            name = left.pop(0)
            try:
                left_over = max(1.0, seconds - (clock() - began))
                answer = worker.judge(name, min(CASE_SECONDS[device], left_over))
            except LostError as error:
                answer = Answer(name, "FAIL", str(error), broken=True)
            counts[answer.status] += 1
            say(f"{answer.status} {answer.name} {answer.text}")
            if answer.broken:
                worker.stop()
                worker = None
    except LostError as error:
        counts["FAIL"] += 1
        say(f"FAIL start {error}")
    finally:
        stack.close()
        if worker is not None:
            worker.stop()
        say(
            f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped, {len(left)} not reached "
            f"in {clock() - began:.0f} s"
        )
    return counts


def compile_ahead(target: Any, names: Sequence[str]) -> AbstractContextManager[object]:
    """Compile the kernels of cases in the background while the first of them run."""
    from benchmarks import precompile

    return precompile.compiling_ahead(target, [(launch, (name,)) for name in names])


def launch(name: str) -> None:
    """Launch a case's kernels on few rows of a CPU; see `benchmarks.precompile`."""
    from benchmarks.smoke.cases import every_case

    next(case for case in every_case("cpu") if case.name == name).launch("cpu")


def _started(start: Callable[[str], Worker], device: str, say: Callable[[str], None]) -> Worker:
    """Start a process, and try once more if it is lost at its start."""
    try:
        return start(device)
    except LostError as error:
        say(f"its process could not start: {error}")
        return start(device)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, help="default: 60, or 600 on a CPU")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="cases by name, such as 'fold*'")
    arguments = parser.parse_args()
    # Triton and cuBLAS read these when they are loaded, which only the worker's process does.
    os.environ["TRITON_INTERPRET"] = "1" if arguments.device == "cpu" else "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seconds = arguments.seconds or (60.0 if arguments.device == "cuda" else 600.0)
    try:
        counts = smoke(arguments.device, seconds, arguments.only, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        return 130
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())

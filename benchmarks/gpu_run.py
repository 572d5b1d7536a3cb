"""Run the parts of `benchmarks/gpu_parts.py` one after another under one deadline; `benchmarks/gpu.sh` starts it.

A part is a group of processes. What it prints goes straight into a file of the output folder, so that a kill of any
process at any moment loses nothing that was printed; this process only copies the file to the console. `log.txt` also
has a line for the start and one for the end of each part, from which `benchmarks/gpu_summary.py` tells how it went.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import gpu_summary
from benchmarks.gpu_parts import LOG, NO_GPU, NOT_HERE, PARTS, Part, Settings

ROOT = Path(__file__).resolve().parents[1]
ENDING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
MACHINE = [sys.executable, "-m", "benchmarks.gpu_machine"]
NOT_ENDED = 124
RESERVE = 4.0  # seconds for the summary
GRACE = 5.0  # seconds from the interrupt of a part to its kill
PROBE = 30.0  # seconds for the description of the machine
# The cleanup process reads until this process ends, however it ends, and then kills the process group named last.
CLEANUP = 'while read -r group; do last=$group; done; [ -z "$last" ] || kill -s KILL -- "-$last"'


class Budget:
    """Divide the seconds of a run among its parts.

    A part may take its share and whatever the parts before it have left.
    """

    def __init__(self, seconds: float, weights: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._shares = {name: seconds * weight / sum(weights.values()) for name, weight in weights.items()}

    def allowed(self, name: str) -> float:
        """Return the seconds that a part may take from now on: those left, less the shares of later parts."""
        names = list(self._shares)
        later = sum(self._shares[other] for other in names[names.index(name) + 1 :])
        return max(0.0, self._end - self._clock() - later)


class Log:
    """Append lines to `log.txt` and show them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: str) -> None:
        """Append a line, after ending a line that a killed process left unfinished."""
        with self.path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
            torn = size > 0 and file.read(1) != b"\n"
            file.write(b"\n" * torn + line.encode() + b"\n")
        show(line.encode() + b"\n")


def show(text: bytes) -> None:
    """Write to the console, if anybody still reads it."""
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


@contextlib.contextmanager
def cleanup() -> Iterator[Callable[[str], None]]:
    """Yield a function that takes the process group to kill should this process be killed, "" for none."""
    process = subprocess.Popen(["sh", "-c", CLEANUP], stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdin is not None

    def watch(group: str) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(group + "\n")
            process.stdin.flush()

    try:
        yield watch
    finally:
        process.stdin.close()
        process.wait()


class Process:
    """A part that is running."""

    def __init__(self, command: Sequence[str], prints: Path) -> None:
        with prints.open("ab") as file:
            printed = file.tell()
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._shown = prints.open("rb")
        self._shown.seek(printed)
        self.group = self._process.pid

    def ended(self, seconds: float) -> bool:
        """Wait at most `seconds` for the part to end, show its output meanwhile, and return whether it ended."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(min(0.1, max(0.0, end - time.monotonic())))
            show(self._shown.read())
            if self._process.returncode is not None or time.monotonic() >= end:
                return self._process.returncode is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the part that is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def kill(self) -> int:
        """Kill what is left of the part and return the exit status of its first process, or `NOT_ENDED`."""
        self.signal(signal.SIGKILL)
        status = NOT_ENDED
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(GRACE)
        show(self._shown.read())
        self._shown.close()
        return status


def run_part(part: Part, settings: Settings, allowed: float, log: Log, watch: Callable[[str], None]) -> None:
    """Run one part for `allowed` seconds at most, and log how it ended; it never raises because of the part."""
    prints = settings.out / part.prints
    start = time.monotonic()
    log.write(f"== {part.name}: started, and has {allowed:.0f} s")
    grace = min(GRACE, allowed / 5)
    try:
        if part.prints != LOG:
            prints.write_bytes(b"")
        # A part that is told its seconds ends by itself, which takes a while too.
        process = Process(part.command(settings.lasting(allowed - 2 * grace)), prints)
    except OSError as error:
        log.write(f"== {part.name}: failed (not started: {error}) in 0 s")
        return
    watch(str(process.group))
    state = "interrupted"
    try:
        in_time = process.ended(allowed - grace)
        state = "" if in_time else "out of time"
    finally:
        if state:
            process.signal(signal.SIGINT)
            process.ended(grace - 0.1 if state == "out of time" else min(grace, 1.0))
        status = process.kill()
        watch("")
        log.write(f"== {part.name}: {state or describe(status)} in {time.monotonic() - start:.1f} s")


def describe(status: int) -> str:
    """Return the state of a part that ended by itself."""
    if status in (0, NOT_HERE):
        return "not here" if status else "passed"
    return f"failed ({f'status {status}' if status > 0 else signal.Signals(-status).name})"


def probe(settings: Settings, log: Log, seconds: float) -> bool:
    """Log the machine, in a process of its own because a broken driver may hang; return whether to go on."""
    process = Process([*MACHINE, settings.device], log.path)
    in_time = process.ended(seconds)
    status = process.kill()
    if not in_time:
        log.write(f"== machine: not known; {MACHINE[-1]} was ended after {seconds:.0f} s")
    return status != NO_GPU


def run(settings: Settings, seconds: float, parts: Sequence[Part], log: Log) -> int:
    """Run the parts and return the exit status: 1 if one failed or ran out of time."""
    start = time.monotonic()
    for number in ENDING:
        signal.signal(number, interrupt)
    status = 0
    try:
        log.write(f"== parts: {' '.join(part.name for part in parts)}")
        if not probe(settings, log, min(PROBE, seconds / 5)):
            log.write("the torch of this Python sees no GPU; --device cpu rehearses without one")
            return 1
        left = seconds - RESERVE - (time.monotonic() - start)
        budget = Budget(left, {part.name: part.share for part in parts})
        with cleanup() as watch:
            for part in parts:
                run_part(part, settings, budget.allowed(part.name), log, watch)
                write_summary(settings.out)  # a kill of this process leaves that of the parts so far
    except KeyboardInterrupt:
        status = INTERRUPTED
    show(b"\n" + write_summary(settings.out).encode())
    return status or gpu_summary.status(settings.out)


def interrupt(*_: object) -> None:
    """Raise `KeyboardInterrupt` once; later signals are ignored, so that the part is ended and the summary written."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def write_summary(out: Path) -> str:
    """Write `summary.md` and return it; an error in it must not end the run, so its traceback is returned."""
    for partial in out.glob("*.partial"):
        partial.unlink()
    try:
        return gpu_summary.write(out)
    except Exception:
        return traceback.format_exc()


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Parse the options and run the parts."""
    known = {part.name: part for part in parts}
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder of the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu rehearses on tiny shapes")
    parser.add_argument("--seconds", default=540.0, type=float, help="time for the whole run (default: %(default)s)")
    parser.add_argument("--shapes", default="default", help="the shapes of fastpref bench (default: %(default)s)")
    parser.add_argument("--only", default=",".join(known), help="the parts, in order (default: %(default)s)")
    given = parser.parse_args(arguments)
    names = list(dict.fromkeys(given.only.split(",")))
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only has {', '.join(map(repr, unknown))}; the parts are {', '.join(known)}")
    if not given.seconds >= (least := RESERVE + 1 + len(names)):
        parser.error(f"--seconds is {given.seconds:g}; {len(names)} parts and a summary need {least:g} at least")
    given.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(given.out.resolve(), given.device, given.shapes)
    return run(settings, given.seconds, [known[name] for name in names], Log(settings.out / LOG))


if __name__ == "__main__":
    sys.exit(main())

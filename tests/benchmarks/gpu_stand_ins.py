"""Runs `benchmarks/gpu_run.py` on parts that stand in for those of a GPU, and is what these parts run.

Each writes what the part that it stands in for writes, and the start of a line more. The part that the environment
names then tells so through a FIFO that a process of its own holds open too, and never ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import gpu_run, store
from benchmarks.gpu_parts import PARTS, Part, Settings

NAMES = [part.name for part in PARTS]
PRINTED = {
    "smoke": "PASS logprobs/plain error=1e-7 allowed=3e-7\nFAIL logprobs/in-place error=2.0 allowed=3.4e-7\nPASS to",
    "sweep": "sweeping\nbest thr",
    "tests": "..F\n.",
    "bench": "one shape\ntw",
    "check": "checking\nch",
    "profile": '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum"\n"0","fold_kernel","1500"\n"1","fo',
    "sanitizer": "-- memcheck\n========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error\n===",
}
WRITTEN = {
    "sweep": "kernel,V,config,us,current,of_copy,of_product,status\n"
    "fold,4096,a,5,,0.5,nan,ok\nfold,4096,b,75000,1,,,ok\nfold,64,c,,,,,OutOfMemory\nfo",
    "tests": "PASSED t.py::test_a 0.01 s\nFAILED t.py::test_b 0.02 s: AssertionError: it is\n    assert 1 == 2\nPAS",
    "check": "".join(
        json.dumps(
            {
                "case": "gae",
                "device": "cpu",
                "dtype": "float32",
                "output": "result",
                "error": error,
                "allowance": 1.0,
                "ok": error < 1,
                "fault": None if error < 1 else "error 2, which is too much",
            }
        )
        + "\n"
        for error in (0.5, 2.0)
    )
    + '{"case": "ga',
}
FILES = {"sweep": "sweep.csv", "tests": "tests.txt", "check": "check.jsonl"}


def bench(out: Path) -> None:
    base = {"subject": "logprobs", "device": "cuda", "allocator": "default", "dtype": "bf16", "V": 7}
    ours = {"name": "fastpref", "package": "fastpref", "pass": "forward + backward", "gate": "within", "ms": 1.25}
    peer = {"name": "a peer", "package": "torch", "pass": "forward + backward", "gate": "within", "ms": 2.5}
    wrong = {"name": "another", "package": "torch", "gate": "failed", "problem": "RuntimeError no kernel image"}
    store.write(out / "a-gpu.csv", [{**base, **row} for row in (ours, peer, wrong)])


def part(name: str, out: Path) -> None:
    """What a part runs."""
    if os.environ.get("DEAF"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if name == "bench":
        bench(out)
    elif name in WRITTEN:
        (out / FILES[name]).write_text(WRITTEN[name])
    sys.stdout.write(PRINTED[name])
    sys.stdout.flush()
    if os.environ.get("BLOCKS") == name:
        with open(os.environ["FIFO"], "w") as pipe:
            child = subprocess.Popen(["sleep", "1000000"], pass_fds=[pipe.fileno()])
            print("reached", file=pipe, flush=True)
            child.wait()


def stand_in(part: Part) -> Part:
    """A part with another command."""

    def command(settings: Settings) -> list[str]:
        return [sys.executable, __file__, part.name, str(settings.out)]

    return replace(part, command=command)


if __name__ == "__main__":
    if sys.argv[1] in NAMES:
        part(sys.argv[1], Path(sys.argv[2]))
    else:
        gpu_run.MACHINE[:] = [sys.executable, "-c", "print('== machine: A GPU, torch 2.11')"]
        sys.exit(gpu_run.main(parts=[stand_in(part) for part in PARTS]))

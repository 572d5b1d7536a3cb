"""Run `benchmarks/smallest.py` under the tools of compute-sanitizer: python -m benchmarks.gpu_sanitizer cuda|cpu.

On a CPU it runs without a tool. The exit status is 77 if compute-sanitizer is not on PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_parts import NOT_HERE

ERRORS = 9
TOOLS = ("memcheck", "racecheck", "initcheck")
SMALLEST = Path(__file__).with_name("smallest.py")


def main(device: str) -> int:
    """Return 1 if a tool found errors or the program failed."""
    program = [sys.executable, str(SMALLEST), device]
    if device == "cpu":
        return subprocess.run(program, check=False).returncode
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH")
        return NOT_HERE
    # The tools cannot check memory that PyTorch caches and hands out again.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for tool in TOOLS:
        print(f"-- {tool}", flush=True)
        options = ["--tool", tool, "--error-exitcode", str(ERRORS), "--print-limit", "20"]
        command = ["compute-sanitizer", *options, *program]
        failed |= subprocess.run(command, env=environment, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

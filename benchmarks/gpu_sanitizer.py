"""Run `benchmarks/smallest.py` under the tools of compute-sanitizer: python benchmarks/gpu_sanitizer.py cuda|cpu.

On a CPU it runs without any. The exit status is 77 where compute-sanitizer is not on PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NOT_HERE = 77
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
    # Memory that PyTorch hands out again is none that a tool can watch.
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

"""Print a line about the machine and the installed packages: python -m benchmarks.gpu_machine cuda|cpu.

The exit status is 3 if a GPU is asked for and torch sees none.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from benchmarks.gpu_parts import NO_GPU

# The distribution and the module of each optional package.
OPTIONAL = {
    "triton": "triton",
    "transformers": "transformers",
    "trl": "trl",
    "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
    "fla-core": "fla",
    "quack-kernels": "quack",
    "pytest-xdist": "xdist",
}


def installed() -> list[str]:
    """Return the optional packages that are importable, with their versions."""
    found = []
    for package, module in OPTIONAL.items():
        if find_spec(module) is not None:
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                found.append(package)
    return found


def driver() -> str:
    """Return the version of the GPU driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not known"


def main(device: str) -> int:
    """Print the line."""
    gpu = torch.cuda.is_available()
    parts = [
        f"{len(os.sched_getaffinity(0))} cores",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    if gpu:
        parts = [torch.cuda.get_device_name(), f"driver {driver()}", *parts]
    parts += [*installed(), *(tool for tool in ("ncu", "compute-sanitizer") if shutil.which(tool))]
    print(f"== machine: {', '.join(parts)}")
    return NO_GPU if device == "cuda" and not gpu else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

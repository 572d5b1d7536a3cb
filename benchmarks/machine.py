"""Describe the machine and the code of a measurement, and tell whether an earlier measurement still holds."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "fla-core",
    "quack-kernels",
)
# The folders whose code a measurement runs, without the command line and the report.
MEASURED = ("fastpref", "kernels", "benchmarks")
NOT_MEASURED = (
    "fastpref/cli",
    "benchmarks/report",
    "benchmarks/results",
    "benchmarks/gpu_summary",
    "benchmarks/gpu_evidence",
)


def package_version(package: str) -> str:
    """Return the version of a package, or "not installed"; that of fastpref is a digest of its code."""
    if package == "fastpref":
        return _code()
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return the name of the processor, with its family and model, since several processors share a name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    name = re.sub(r"\((R|TM)\)|CPU|@.*", "", fields.get("model name", platform.machine()))
    return " ".join([*name.split(), *(fields[key] for key in ("cpu family", "model") if key in fields)])


def machine(device: str) -> str:
    """Return the name of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def slug(device: str) -> str:
    """Return the name of the machine in the form of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")


def provenance(device: str) -> dict[str, str]:
    """Return the fields of a row that say where it was measured: machine, commit, processor, threads and versions."""
    return {
        "machine": machine(device),
        "commit": _commit(),
        "state": state(device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
    }


@functools.cache
def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@functools.cache
def _code() -> str:
    """Return a digest of every source file that a measurement runs."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".cpp", ".h") and not name.startswith(NOT_MEASURED):
                digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.cache
def state(device: str) -> str:
    """Return a digest of all that a row depends on besides its shape; a row with the same digest still holds.

    It leaves the commit out, since a commit may change documents only.
    """
    parts = [machine(device), _code(), platform.python_version(), str(torch.get_num_threads())]
    parts += [package_version(package) for package in PACKAGES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

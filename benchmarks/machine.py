"""Where a figure was measured, and on what code: what every row states, and what decides whether it still holds."""

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
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "fla-core", "quack-kernels",
)  # fmt: skip
# What a measurement runs: not the command line, nor what draws the results.
MEASURED = ("fastpref", "kernels", "benchmarks")
NOT_MEASURED = ("fastpref/cli", "benchmarks/report", "benchmarks/results")


def package_version(package: str) -> str:
    """A package's version, or that it is not installed."""
    if package == "fastpref":
        return _code()
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name as the system has it, and what tells two of one name apart."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    name = re.sub(r"\((R|TM)\)|CPU|@.*", "", fields.get("model name", platform.machine()))
    return " ".join([*name.split(), *(fields[key] for key in ("cpu family", "model") if key in fields)])


def machine(device: str) -> str:
    """The machine in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def slug(device: str) -> str:
    """The machine as the name of its file."""
    return re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")


def provenance(device: str) -> dict[str, str]:
    """What a figure depends on beside its shape: machine, commit, processor, threads, and what runs it."""
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
    """A digest of every source file that a measurement runs."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".cpp", ".h") and not name.startswith(NOT_MEASURED):
                digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.cache
def state(device: str) -> str:
    """A digest of all that a row depends on beside its shape; where it is the same, a row need not be measured again.

    The commit is not in it: one that touches a document changes no figure.
    """
    parts = [machine(device), _code(), platform.python_version(), str(torch.get_num_threads())]
    parts += [package_version(package) for package in PACKAGES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

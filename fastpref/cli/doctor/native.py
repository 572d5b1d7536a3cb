"""Examine the C++ operators of the CPU: the compiler, the cache, and the build."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from fastpref.cli.doctor.installed import installed
from fastpref.cli.doctor.section import Finding, Section
from fastpref_kernels.cpu import build
from fastpref_kernels.cpu.linear import bf16_route

SLOWER = "a CPU runs chunked PyTorch in place of C++: the same numbers, slower"
# Lines of a compiler's output to show.
LINES = 12
INSTALL = "apt-get install g++   (or: conda install -c conda-forge gxx; or set CXX to a C++ compiler)"

BF16_PRODUCTS = {
    "MKL": "MKL, with AMX_BF16",
    "oneDNN": "oneDNN on packed blocks, with AVX512_BF16",
    "float32": "float32 products of widened operands",
}


def native_section(may_build: bool) -> tuple[Section, str]:
    """Return the section, and what runs the row passes on a CPU: "C++" or "PyTorch".

    Args:
        may_build: whether to build the operators if they are not built yet.
    """
    folder = build.cache_root()
    section = Section("C++ operators")
    problem = _compiler(section)
    section.facts.update({"ninja": installed("ninja"), "flags": " ".join(build.flags()), "cache": str(folder)})
    if os.environ.get("FASTPREF_NATIVE", "1") == "0":
        what = "FASTPREF_NATIVE is 0"
        section.facts["state"] = f"not used: {what}"
        section.findings.append(Finding(what=what, costs=SLOWER, fix="unset FASTPREF_NATIVE", is_error=False))
        return section, "PyTorch"
    path = folder / build.key() / f"{build.NAME}.so"
    built = path.exists()
    unwritable = _unwritable(folder)
    if unwritable is not None and not built:
        what, fix = f"the cache {folder} cannot be written: {unwritable}", "export FASTPREF_CACHE_DIR=/another/folder"
        section.findings.append(Finding(what=what, costs=SLOWER, fix=fix))
    if problem is not None and not built:
        section.facts["state"] = "not built: no compiler that runs"
        section.findings.append(Finding(what=problem, costs=SLOWER, fix=INSTALL))
        return section, "PyTorch"
    section.facts["library"] = str(path)
    if not built and unwritable is not None:
        section.facts["state"] = "not built: nowhere to put it"
        return section, "PyTorch"
    if not built and not may_build:
        section.facts["state"] = "not built yet: the first call on a CPU builds them, in about half a minute"
        return section, "C++"
    return section, _load(section, path, built)


def _load(section: Section, path: Path, built: bool) -> str:
    start = time.perf_counter()
    try:
        torch.ops.load_library(build.library())  # says on stderr that it builds
    except (build.BuildError, ImportError, OSError) as error:
        section.facts["state"] = "built, and cannot be loaded" if built else "the build failed"
        if built:
            fix = f"rm -r {path.parent}"
        else:
            fix = INSTALL if isinstance(error, build.BuildError) else "pip install --force-reinstall ninja"
        told = "\n".join(str(error).splitlines()[:LINES])
        section.findings.append(Finding(what=f"C++ operators: {section.facts['state']}: {told}", costs=SLOWER, fix=fix))
        return "PyTorch"
    section.facts["bfloat16 products"] = bf16_products()
    section.facts["state"] = "built already" if built else f"built now, in {time.perf_counter() - start:.0f} s"
    return "C++"


def bf16_products() -> str:
    """Return what multiplies bfloat16 matrices on this CPU; build the operators if they are not built yet."""
    return BF16_PRODUCTS[bf16_route()]


def _compiler(section: Section) -> str | None:
    """Add the compiler and its version to the facts; return what is wrong with it, or None."""
    try:
        command = build.compiler()
        done = subprocess.run([*command.split(), "--version"], capture_output=True, text=True, check=False)
    except (build.BuildError, OSError) as error:
        section.facts["C++ compiler"] = "none"
        return str(error)
    by = "by CXX" if os.environ.get("CXX") else "the first of the usual names"
    section.facts["C++ compiler"] = f"{command} ({by}): {done.stdout.partition(chr(10))[0]}"
    return None


def _unwritable(folder: Path) -> str | None:
    """Return why a folder, or the folder that it would be created in, cannot be written to, or None."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)

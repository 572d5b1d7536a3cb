"""Examine Python, torch, Triton, the supported libraries and the environment variables."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fastpref.cli.doctor.section import Finding, Section

LIBRARIES = ("trl", "verl", "openrlhf", "transformers", "peft", "accelerate", "lightning")
VARIABLES = {
    "FASTPREF_NATIVE": "0: no C++ operators on a CPU",
    "FASTPREF_CACHE_DIR": "the folder of the built C++ operators",
    "XDG_CACHE_HOME": "the parent of that folder if FASTPREF_CACHE_DIR is not set",
    "CXX": "the C++ compiler",
    "OMP_NUM_THREADS": "threads of the C++ operators",
    "MKL_NUM_THREADS": "threads of MKL's products",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16: oneDNN rounds float32 operands, so fastpref does not use its products",
    "THP_MEM_ALLOC_ENABLE": "1: huge pages under torch's tensors on a CPU",
    "ATEN_CPU_CAPABILITY": "the vector instructions torch uses",
    "CUDA_VISIBLE_DEVICES": "the GPUs torch may see",
    "HIP_VISIBLE_DEVICES": "the GPUs torch may see, on ROCm",
    "TRITON_INTERPRET": "1: Triton kernels run in Python, slowly",
    "TRITON_DEBUG": "1: Triton kernels check labels",
    "TRITON_CACHE_DIR": "the folder of Triton's compiled kernels",
    "TORCH_COMPILE_DISABLE": "1: torch.compile does nothing",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1: float32 products on a GPU are rounded to TF32",
}


def wanted(package: str) -> SpecifierSet:
    """Return the versions of a package that the metadata of fastpref allows."""
    try:
        lines = requires("fastpref") or []
    except PackageNotFoundError:  # fastpref is not installed
        lines = []
    for requirement in map(Requirement, lines):
        if requirement.name == package and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            return requirement.specifier
    return SpecifierSet()


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def python_section() -> Section:
    """Return the section about the interpreter and fastpref."""
    facts = {
        "version": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "fastpref": installed("fastpref"),
    }
    return Section("Python", facts)


def torch_section() -> Section:
    """Return the section about torch: its version, its build, and its view of the CPU."""
    allowed = wanted("torch")
    section = Section(
        "torch",
        {
            "version": torch.__version__,
            "wanted": str(allowed) or "any",
            "build": build(),
            "CPU capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "CPU cores": os.cpu_count(),
        },
    )
    if not allowed.contains(torch.__version__, prereleases=True):
        section.findings.append(
            Finding(
                what=f"torch {torch.__version__} is not one of {allowed}",
                costs="operators may fail, or be traced wrongly",
                fix=f"pip install --upgrade 'torch{allowed}'",
            )
        )
    return section


def build() -> str:
    """Return what torch was built for."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"XPU {torch.version.xpu}" if getattr(torch.version, "xpu", None) else "CPU"


def triton_section(has_gpu: bool) -> Section:
    """Return the section about Triton; a problem is a finding only on a machine with a GPU."""
    allowed = wanted("triton")
    section = Section("Triton", {"version": None, "wanted": str(allowed) or "any"})
    # Builds of torch for ROCm and XPU bring a Triton with another package name.
    fix = f"pip install 'triton{allowed}'" if build().startswith(("CUDA", "CPU")) else "pip install --upgrade torch"
    slow = "the GPU runs chunked PyTorch in place of fused kernels"
    problem = None
    if importlib.util.find_spec("triton") is None:
        problem = Finding(what="Triton is not installed", costs=slow, fix=fix)
    else:
        try:
            found = importlib.import_module("triton").__version__
        except Exception as error:
            problem = Finding(
                what=f"Triton cannot be imported: {error}", costs="every operator on a GPU raises this", fix=fix
            )
        else:
            section.facts["version"] = found
            if not allowed.contains(found, prereleases=True):
                costs = "kernels may not compile, or be wrong"
                problem = Finding(what=f"Triton {found} is not one of {allowed}", costs=costs, fix=fix)
    if problem is not None:
        section.facts["state"] = problem.what
        if has_gpu:
            section.findings.append(problem)
    return section


def integrations_section() -> Section:
    """Return the section about supported libraries: their versions, and whether `patch` supports these."""
    section = Section("Integrations")
    for library in LIBRARIES:
        found = installed(library)
        if found is None:
            section.facts[library] = "not installed"
            continue
        supported, problem = _patches(library)
        section.facts[library] = found
        if problem is not None:
            section.facts[library] = f"{found}, which patch() refuses; {supported} is known"
            costs = f"fastpref.integrations.{library}.patch() raises, so {library} scores tokens without fastpref"
            fix = f"pip install '{library}{supported}'"
            section.findings.append(Finding(what=problem, costs=costs, fix=fix, is_error=False))
        elif supported is not None:
            section.facts[library] = f"{found}, which patch() takes; {supported} is known"
    return section


def _patches(library: str) -> tuple[str | None, str | None]:
    """Return the versions that an integration supports, or None if it replaces nothing, and an error, or None."""
    if importlib.util.find_spec(f"fastpref.integrations.{library}") is None:
        return None, None
    module = importlib.import_module(f"fastpref.integrations.{library}")
    supported = getattr(module, "SUPPORTED", None)
    if supported is None:
        return None, None
    try:
        # `patch` imports the library and compares the functions that it replaces.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with module.patch():
                pass
    except Exception as error:
        return supported, f"{library}: {error}"
    return supported, None


def environment_section() -> Section:
    """Return the section with the variables that are set and change what runs."""
    section = Section("Environment")
    for name, meaning in VARIABLES.items():
        if name in os.environ:
            section.facts[name] = f"{os.environ[name]}  ({meaning})"
    return section

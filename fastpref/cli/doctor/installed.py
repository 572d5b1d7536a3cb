"""What is installed: Python, torch, Triton, the libraries that fastpref goes into, and the environment's variables."""

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
    "FASTPREF_NATIVE": "0: no C++ on a CPU",
    "FASTPREF_CACHE_DIR": "where the built C++ operators lie",
    "XDG_CACHE_HOME": "holds that folder where FASTPREF_CACHE_DIR is not set",
    "CXX": "the C++ compiler",
    "OMP_NUM_THREADS": "threads of the C++ operators",
    "MKL_NUM_THREADS": "threads of MKL's products",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16: oneDNN rounds float32 operands; fastpref then does without its products",
    "THP_MEM_ALLOC_ENABLE": "1: huge pages under torch's tensors on a CPU",
    "ATEN_CPU_CAPABILITY": "the vector instructions torch uses",
    "CUDA_VISIBLE_DEVICES": "the GPUs torch may see",
    "HIP_VISIBLE_DEVICES": "the GPUs torch may see, on ROCm",
    "TRITON_INTERPRET": "1: Triton kernels run in Python, slowly",
    "TRITON_DEBUG": "1: Triton kernels check labels",
    "TRITON_CACHE_DIR": "where Triton's compiled kernels lie",
    "TORCH_COMPILE_DISABLE": "1: torch.compile does nothing",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1: float32 products on a GPU are rounded to TF32",
}


def wanted(package: str) -> SpecifierSet:
    """The versions of a package that fastpref's own metadata allows."""
    try:
        lines = requires("fastpref") or []
    except PackageNotFoundError:  # used from its folder
        lines = []
    for requirement in map(Requirement, lines):
        if requirement.name == package and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            return requirement.specifier
    return SpecifierSet()


def installed(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def python_section() -> Section:
    """The interpreter, and fastpref itself."""
    facts = {
        "version": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "fastpref": installed("fastpref"),
    }
    return Section("Python", facts)


def torch_section() -> Section:
    """Its version, what it was built for, and the CPU as it sees it."""
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
                mend=f"pip install --upgrade 'torch{allowed}'",
            )
        )
    return section


def build() -> str:
    """What torch was built for."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"XPU {torch.version.xpu}" if getattr(torch.version, "xpu", None) else "CPU"


def triton_section(has_gpu: bool) -> Section:
    """Whether the kernels for a GPU can be compiled; what is missing counts on a machine that has one."""
    allowed = wanted("triton")
    section = Section("Triton", {"version": None, "wanted": str(allowed) or "any"})
    # Triton of ROCm's and XPU's builds comes with torch, under other names.
    mend = f"pip install 'triton{allowed}'" if build().startswith(("CUDA", "CPU")) else "pip install --upgrade torch"
    slow = "the GPU runs chunked PyTorch in place of fused kernels"
    problem = None
    if importlib.util.find_spec("triton") is None:
        problem = Finding(what="Triton is not installed", costs=slow, mend=mend)
    else:
        try:
            found = importlib.import_module("triton").__version__
        except Exception as error:
            problem = Finding(
                what=f"Triton cannot be imported: {error}", costs="every operator on a GPU raises this", mend=mend
            )
        else:
            section.facts["version"] = found
            if not allowed.contains(found, prereleases=True):
                costs = "kernels may not compile, or be wrong"
                problem = Finding(what=f"Triton {found} is not one of {allowed}", costs=costs, mend=mend)
    if problem is not None:
        section.facts["state"] = problem.what
        if has_gpu:
            section.findings.append(problem)
    return section


def integrations_section() -> Section:
    """The libraries fastpref goes into: their versions, and whether `patch` would take them."""
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
            costs = f"fastpref.integrations.{library}.patch() raises, so {library} scores tokens as ever"
            mend = f"pip install '{library}{supported}'"
            section.findings.append(Finding(what=problem, costs=costs, mend=mend, is_error=False))
        elif supported is not None:
            section.facts[library] = f"{found}, which patch() takes; {supported} is known"
    return section


def _patches(library: str) -> tuple[str | None, str | None]:
    """The versions that an integration knows, None where it replaces nothing; and what it has against this one."""
    if importlib.util.find_spec(f"fastpref.integrations.{library}") is None:
        return None, None
    module = importlib.import_module(f"fastpref.integrations.{library}")
    supported = getattr(module, "SUPPORTED", None)
    if supported is None:
        return None, None
    try:
        # As in a training script: it imports the library, and compares what it replaces.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with module.patch():
                pass
    except Exception as error:
        return supported, f"{library}: {error}"
    return supported, None


def environment_section() -> Section:
    """The variables that change what runs, of those that are set."""
    section = Section("Environment")
    for name, meaning in VARIABLES.items():
        if name in os.environ:
            section.facts[name] = f"{os.environ[name]}  ({meaning})"
    return section

"""Examine the devices of this machine, and find the kernel of each operator on each device."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fastpref import losses
from fastpref.cli.doctor.installed import build
from fastpref.cli.doctor.section import Finding, Section
from fastpref_kernels import ops

# The file that the driver of each maker's GPUs creates.
NODES = {"NVIDIA": Path("/dev/nvidia0"), "AMD": Path("/dev/kfd")}
REINSTALL = {
    "NVIDIA": "pip install --force-reinstall torch   (or the index of https://pytorch.org for your CUDA)",
    "AMD": "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm6.4",
}
TARGET = "python -c 'from triton.runtime import driver; print(driver.active.get_current_target())'   (shows the error)"
KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}
# These are registered for every device because they write to an argument, but they call PyTorch's operators only.
PYTORCH = {"linear_finalize", "scaled_gradient"}


def gpu_section() -> tuple[Section, list[str], bool]:
    """Return the section, the types of GPU that torch can use, and whether the machine has a GPU at all."""
    section, types = Section("GPUs"), []
    told: list[str] = []
    for kind in ("cuda", "xpu"):
        module = torch.get_device_module(kind)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = module.is_available()
        told += [str(warning.message).partition("\n")[0] for warning in caught]
        if available:
            types.append(kind)
            for index in range(module.device_count()):
                _add(section, kind, index)
    if not types:
        section.facts["found by torch"] = "none"
    seen = [maker for maker, path in NODES.items() if path.exists()]
    if seen and "cuda" not in types:
        section.findings.extend(_unusable(maker, told) for maker in seen)
    return section, types, bool(seen or types)


def _unusable(maker: str, told: list[str]) -> Finding:
    what = f"there is an {maker} GPU ({NODES[maker]}), and torch, built for {build()}, cannot use it"
    if told:
        what += f": {told[0]}"
    hidden = [name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ]
    if not build().startswith({"NVIDIA": "CUDA", "AMD": "ROCm"}[maker]):
        fix = REINSTALL[maker]
    elif hidden:
        fix = f"unset {' '.join(hidden)}"
    else:
        fix = {"NVIDIA": "nvidia-smi", "AMD": "rocminfo"}[maker] + "   (says what is wrong with the driver)"
    return Finding(what=what, costs="everything runs on the CPU", fix=fix)


def _add(section: Section, kind: str, index: int) -> None:
    """Add a GPU that torch can use to the facts, with the target that Triton compiles for."""
    module = torch.get_device_module(kind)
    properties: Any = module.get_device_properties(index)
    parts = [properties.name, f"{properties.total_memory / 2**30:.0f} GiB"]
    if kind == "cuda" and not torch.version.hip:
        parts.append(f"capability {properties.major}.{properties.minor}")
    name = f"{kind}:{index}"
    try:
        from triton.runtime import driver

        with module.device(index):
            target: Any = driver.active.get_current_target()
        parts.append(f"Triton target {target.backend} {target.arch}")
    except ModuleNotFoundError:  # `triton_section` reports it
        pass
    except Exception as error:  # a broken driver may raise anything
        what = f"Triton has no target for {name}: {error}"
        section.findings.append(Finding(what=what, costs="every operator on it raises", fix=TARGET))
    section.facts[name] = ", ".join(parts)


def operators_section(gpus: list[str], row_pass: str) -> Section:
    """Return the section with every operator of the dispatcher, and what runs it on each device.

    Args:
        gpus: the types of GPU that torch can use.
        row_pass: what runs the row passes on a CPU: "C++" or "PyTorch".
    """
    section = Section("Operators")
    for name in operators():
        section.facts[name] = {device: kernel(name, device, row_pass) for device in ("cpu", *gpus)}
    lacking = [name for name, kernels in section.facts.items() if None in kernels.values()]
    if lacking:
        what = f"no kernel for {', '.join(lacking)}"
        section.findings.append(Finding(what=what, costs="calling it raises", fix="pip install --force-reinstall ."))
    return section


def operators() -> list[str]:
    """Return the names of the dispatcher's operators in fastpref's namespace."""
    prefix = f"{ops.NAMESPACE}::"
    return sorted(
        name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)
    )


def kernel(operator: str, device: str, row_pass: str) -> str | None:
    """Return what runs an operator on a device, or None if nothing does."""

    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.NAMESPACE}::{operator}", key)

    if has(KEYS[device]) and operator not in PYTORCH:
        own = row_pass if device == "cpu" else "Triton"
        schema = getattr(getattr(torch.ops, ops.NAMESPACE), operator).default._schema
        if "weight" in {argument.name for argument in schema.arguments}:
            return f"library products + {own} row pass"
        return "PyTorch, chunked" if own == "PyTorch" else own
    if has(KEYS[device]) or has("CompositeExplicitAutograd"):
        return "PyTorch"
    return "the reference formula" if operator in {loss.operator for loss in losses.TABLE} else None

"""Tests of the findings of `fastpref doctor`, and of the command that fixes each."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("typer")

import torch
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from fastpref import cli
from fastpref.cli.doctor import devices, installed, native
from fastpref.integrations import trl as fastpref_trl
from fastpref.integrations.trl import _patch
from fastpref_kernels import cpu, ops
from fastpref_kernels.cpu import build
from fastpref_kernels.cpu.linear import bf16_route

FAKE_COMPILER = """#!/bin/sh
case "$*" in *-c\\ *) echo "fake: cannot compile" >&2; exit 1;; esac
echo "g++ (fake) 99.0"
"""
WITHOUT = """
import sys
for name in ("transformers", "matplotlib", "tokenizers"):
    sys.modules[name] = None
sys.argv = ["fastpref", "doctor", "--no-build", "--json"]
from fastpref.cli import main
main()
"""


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the files of GPUs, the supported libraries and the variables that change the build."""
    monkeypatch.setattr(devices, "NODES", {"NVIDIA": tmp_path / "nvidia0", "AMD": tmp_path / "kfd"})
    monkeypatch.setattr(installed, "LIBRARIES", ())
    for name in ("CXX", "FASTPREF_NATIVE", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a cache of the test's own, a folder that does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTPREF_CACHE_DIR", str(folder))
    return folder


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(cli._app(), ["doctor", *arguments])


def examine(*arguments: str, status: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the sections and the findings of `--json`."""
    result = doctor("--json", *arguments)
    assert result.exit_code == status, result.output
    found = json.loads(result.stdout)
    assert found["ok"] is (status == 0)
    return found["sections"], found["findings"]


def only(findings: list[dict[str, Any]], *, is_error: bool = True) -> dict[str, Any]:
    (finding,) = findings
    assert finding["is_error"] is is_error
    assert all(finding[name] for name in ("what", "costs", "fix"))
    return finding


class TestThisMachine:
    def test_is_whole(self) -> None:
        assert cpu.native() is not None  # builds the operators if they are not built yet
        sections, findings = examine()
        assert findings == []
        assert sections["Python"]["version"] == ".".join(map(str, sys.version_info[:3]))
        assert sections["torch"]["version"] == torch.__version__
        assert sections["torch"]["threads"] == torch.get_num_threads()
        facts = sections["C++ operators"]
        assert facts["state"] == "built already"
        assert facts["bfloat16 products"] == native.BF16_PRODUCTS[bf16_route()]
        assert facts["library"] == str(build.library())
        assert "-O3" in facts["flags"]
        assert facts["ninja"] == version("ninja")
        assert facts["C++ compiler"].startswith(f"{build.compiler()} (the first of the usual names): ")
        assert len(facts["C++ compiler"].partition("): ")[2]) > 5

    def test_tables_say_the_same(self) -> None:
        result = doctor("--no-build")
        assert result.exit_code == 0, result.output
        for title in ("Python", "torch", "GPUs", "Triton", "C++ operators", "Operators"):
            assert title in result.stdout
        assert torch.__version__ in result.stdout
        assert "linear_logprobs_backward_" in result.stdout
        assert result.stdout.endswith("Nothing is missing.\n")

    def test_variables_are_shown_where_they_are_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_DEBUG", raising=False)
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
        sections, _ = examine("--no-build")
        assert sections["Environment"]["THP_MEM_ALLOC_ENABLE"].startswith("1 ")
        assert "TRITON_DEBUG" not in sections["Environment"]

    def test_works_without_what_the_demo_needs(self) -> None:
        done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["ok"]
        assert "Integrations" in found["sections"]


class TestOperators:
    def test_are_those_of_the_dispatcher(self) -> None:
        sections, _ = examine("--no-build")
        assert set(sections["Operators"]) == {schema.partition("(")[0] for schema in ops._SCHEMAS}
        with torch.library._scoped_library("fastpref", "FRAGMENT") as library:
            library.define("planted(Tensor x) -> Tensor")
            library.impl("planted", lambda x: x, "CompositeExplicitAutograd")
            sections, _ = examine("--no-build")
            assert sections["Operators"]["planted"]["cpu"] == "PyTorch"

    def test_one_without_a_kernel_is_an_error(self) -> None:
        with torch.library._scoped_library("fastpref", "FRAGMENT") as library:
            library.define("planted(Tensor x) -> Tensor")
            sections, findings = examine("--no-build", status=1)
        assert sections["Operators"]["planted"]["cpu"] is None
        assert only(findings)["what"] == "no kernel for planted"

    @pytest.mark.parametrize(
        ("operator", "on_cpu", "without_compiler", "on_gpu"),
        [
            ("logprobs", "C++", "PyTorch, chunked", "Triton"),
            ("logprobs_backward_", "C++", "PyTorch, chunked", "Triton"),
            (
                "linear_logprobs",
                "library products + C++ row pass",
                "library products + PyTorch row pass",
                "library products + Triton row pass",
            ),
            ("linear_finalize", "PyTorch", "PyTorch", "PyTorch"),
            ("scaled_gradient", "PyTorch", "PyTorch", "PyTorch"),
            ("gae", "PyTorch", "PyTorch", "Triton"),
            ("dpo_loss", "the reference formula", "the reference formula", "Triton"),
        ],
    )
    def test_kernels(self, operator: str, on_cpu: str, without_compiler: str, on_gpu: str) -> None:
        if not ops._HAS_TRITON:
            pytest.skip("no Triton: no kernel for a GPU")
        assert devices.kernel(operator, "cpu", "C++") == on_cpu
        assert devices.kernel(operator, "cpu", "PyTorch") == without_compiler
        assert devices.kernel(operator, "cuda", "C++") == on_gpu

    def test_operators_that_are_pytorch_everywhere_are_operators(self) -> None:
        assert set(devices.operators()) >= devices.PYTORCH


class TestNative:
    def test_no_compiler(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "/nonexistent")
        sections, findings = examine(status=1)
        finding = only(findings)
        assert finding["what"].startswith("no C++ compiler (/nonexistent not found)")
        assert "apt-get install g++" in finding["fix"]
        assert "slower" not in finding["fix"]
        assert sections["C++ operators"]["C++ compiler"] == "none"
        assert sections["Operators"]["logprobs"]["cpu"] == "PyTorch, chunked"
        text = doctor().stdout
        for line in ("missing  no C++ compiler", "costs  ", f"fix    {native.INSTALL}", "1 to fix."):
            assert line in text

    def test_a_compiler_that_does_not_run(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = tmp_path / "c++"
        broken.write_bytes(b"\x7fELF of another machine")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        _, findings = examine(status=1)
        assert only(findings)["fix"] == native.INSTALL

    def test_a_compiler_that_fails(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = tmp_path / "c++"
        fake.write_text(FAKE_COMPILER)
        fake.chmod(0o755)
        monkeypatch.setenv("CXX", str(fake))
        sections, findings = examine(status=1)
        assert "fake: cannot compile" in only(findings)["what"]
        assert sections["C++ operators"]["state"] == "the build failed"
        assert sections["C++ operators"]["C++ compiler"] == f"{fake} (by CXX): g++ (fake) 99.0"

    def test_native_is_not_wanted(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTPREF_NATIVE", "0")
        sections, findings = examine()
        assert only(findings, is_error=False)["fix"] == "unset FASTPREF_NATIVE"
        assert sections["Operators"]["logprobs"]["cpu"] == "PyTorch, chunked"
        assert sections["Environment"]["FASTPREF_NATIVE"].startswith("0 ")
        assert not cache.exists()
        assert "note  FASTPREF_NATIVE is 0" in doctor().stdout

    def test_only_looks(self, cache: Path) -> None:
        sections, findings = examine("--no-build")
        assert findings == []
        assert sections["C++ operators"]["state"].startswith("not built yet")
        assert not cache.exists()

    def test_builds(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patched:
            patched.delenv("FASTPREF_CACHE_DIR")
            there = build.library()
        # A link, because loading a second copy would register the same operators again.
        monkeypatch.setattr(build, "_build", lambda target: target.symlink_to(there))
        sections, findings = examine()
        assert findings == []
        assert sections["C++ operators"]["state"].startswith("built now, in ")
        assert Path(sections["C++ operators"]["library"]).is_relative_to(cache)
        assert sections["Operators"]["logprobs"]["cpu"] == "C++"
        assert examine()[0]["C++ operators"]["state"] == "built already"

    def test_a_library_that_does_not_load(self, cache: Path) -> None:
        path = cache / build.key() / f"{build.NAME}.so"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half of a file")
        sections, findings = examine(status=1)
        assert only(findings)["fix"] == f"rm -r {path.parent}"
        assert sections["Operators"]["logprobs"]["cpu"] == "PyTorch, chunked"

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("FASTPREF_CACHE_DIR", str(tmp_path / "file" / "cache"))
        sections, findings = examine(status=1)
        finding = only(findings)
        assert "Not a directory" in finding["what"]
        assert finding["fix"].startswith("export FASTPREF_CACHE_DIR=")
        assert sections["C++ operators"]["state"] == "not built: nowhere to put it"


class TestVersions:
    def test_are_those_of_the_metadata(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = ["torch>=1; extra == 'demo'", "torch>=2.8", "triton>=3.4; platform_system == 'Nowhere'", "ninja"]
        monkeypatch.setattr(installed, "requires", lambda package: lines)
        assert str(installed.wanted("torch")) == ">=2.8"
        assert str(installed.wanted("triton")) == ""
        assert str(installed.wanted("numpy")) == ""

    def test_torch_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installed, "wanted", lambda package: SpecifierSet(">=99" if package == "torch" else ""))
        _, findings = examine("--no-build", status=1)
        assert only(findings)["fix"] == "pip install --upgrade 'torch>=99'"


def triton(monkeypatch: pytest.MonkeyPatch, number: str | None) -> None:
    """Install a module that claims to be this version of Triton, or hide Triton."""
    module = None
    if number is not None:
        module = ModuleType("triton")
        module.__spec__ = ModuleSpec("triton", None)
        module.__dict__["__version__"] = number
    monkeypatch.setitem(sys.modules, "triton", module)
    monkeypatch.setattr(installed, "wanted", lambda package: SpecifierSet(">=3.4" if package == "triton" else ""))


class TestTriton:
    @pytest.mark.parametrize(
        ("number", "words"), [(None, "Triton is not installed"), ("3.1.0", "Triton 3.1.0 is not one of >=3.4")]
    )
    def test_counts_beside_a_gpu(self, number: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        triton(monkeypatch, number)
        assert installed.triton_section(has_gpu=False).findings == []
        section = installed.triton_section(has_gpu=True)
        (finding,) = section.findings
        assert finding.is_error
        assert finding.what == words == section.facts["state"]
        if installed.build() == "CPU":
            assert finding.fix == "pip install 'triton>=3.4'"

    def test_is_new_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        triton(monkeypatch, "3.5.0.dev20250801+git1234")
        assert installed.triton_section(has_gpu=True).findings == []

    def test_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(name: str) -> Any:
            raise OSError("libcuda.so.1: no such file")

        triton(monkeypatch, "3.9")
        monkeypatch.setattr(installed.importlib, "import_module", broken)
        (finding,) = installed.triton_section(has_gpu=True).findings
        assert "libcuda.so.1" in finding.what


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
class TestGPUThatTorchCannotUse:
    def test_torch_is_built_for_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for maker, node in devices.NODES.items():
            node.touch()
            monkeypatch.setattr(devices, "build", lambda: "CPU")
            _, findings = examine("--no-build", status=1)
            finding = only(findings)
            assert f"there is an {maker} GPU ({node})" in finding["what"]
            assert finding["fix"] == devices.REINSTALL[maker]
            assert finding["costs"] == "everything runs on the CPU"
            node.unlink()

    def test_it_is_hidden_or_has_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        devices.NODES["NVIDIA"].touch()
        monkeypatch.setattr(devices, "build", lambda: "CUDA 12.8")
        assert only(examine("--no-build", status=1)[1])["fix"].startswith("nvidia-smi")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert only(examine("--no-build", status=1)[1])["fix"] == "unset CUDA_VISIBLE_DEVICES"

    def test_what_torch_says_of_it_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def old_driver() -> bool:
            warnings.warn("The NVIDIA driver on your system is too old", UserWarning, stacklevel=2)
            return False

        devices.NODES["NVIDIA"].touch()
        monkeypatch.setattr(torch.cuda, "is_available", old_driver)
        assert only(examine("--no-build", status=1)[1])["what"].endswith("driver on your system is too old")

    def test_no_triton_beside_it_is_another_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        devices.NODES["NVIDIA"].touch()
        triton(monkeypatch, None)
        _, findings = examine("--no-build", status=1)
        assert [finding["what"].split(",")[0] for finding in findings][1] == "Triton is not installed"


class TestGPUThatTorchCanUse:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch report two GPUs of the same type."""
        properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0)
        here = SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 2,
            get_device_properties=lambda index: properties,
            device=lambda index: nullcontext(),
        )
        absent = SimpleNamespace(is_available=lambda: False)
        monkeypatch.setattr(torch, "get_device_module", lambda kind: here if kind == "cuda" else absent)

    def target(self, monkeypatch: pytest.MonkeyPatch, get: Callable[[], Any]) -> None:
        runtime = ModuleType("triton.runtime")
        runtime.__dict__["driver"] = SimpleNamespace(active=SimpleNamespace(get_current_target=get))
        monkeypatch.setitem(sys.modules, "triton.runtime", runtime)

    @pytest.mark.skipif(not ops._HAS_TRITON, reason="no Triton: no kernel for a GPU")
    def test_is_described_and_has_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.target(monkeypatch, lambda: SimpleNamespace(backend="cuda", arch=90))
        devices.NODES["NVIDIA"].touch()
        sections, findings = examine("--no-build")
        assert findings == []
        words = "NVIDIA H100, 80 GiB, capability 9.0, Triton target cuda 90"
        assert sections["GPUs"] == {"cuda:0": words, "cuda:1": words}
        assert sections["Operators"]["dpo_loss"] == {"cpu": "the reference formula", "cuda": "Triton"}

    def test_that_triton_has_no_target_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_driver() -> Any:
            raise RuntimeError("0 active drivers")

        self.target(monkeypatch, no_driver)
        section, types, has_gpu = devices.gpu_section()
        assert (types, has_gpu) == (["cuda"], True)
        assert [finding.what for finding in section.findings] == [
            f"Triton has no target for cuda:{i}: 0 active drivers" for i in range(2)
        ]
        assert all(finding.is_error for finding in section.findings)


class TestIntegrations:
    def test_one_that_patch_refuses_is_a_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> Any:
            print("a library that prints while it is imported")
            raise NotImplementedError("fastpref knows how trl>=1.15 scores tokens; installed is 0.1, another version")

        monkeypatch.setattr(installed, "LIBRARIES", ("trl",))
        monkeypatch.setattr(installed, "installed", lambda package: "0.1")
        monkeypatch.setattr(fastpref_trl, "patch", refuse)
        sections, findings = examine("--no-build")
        assert sections["Integrations"] == {"trl": f"0.1, which patch() refuses; {fastpref_trl.SUPPORTED} is known"}
        finding = only(findings, is_error=False)
        assert "installed is 0.1, another version" in finding["what"]
        assert finding["fix"] == f"pip install 'trl{fastpref_trl.SUPPORTED}'"

    def test_the_installed_trl_is_patched_and_given_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("trl")
        monkeypatch.setattr(installed, "LIBRARIES", ("trl", "nothing"))
        sections, findings = examine("--no-build")
        assert findings == []
        assert sections["Integrations"]["trl"].startswith(f"{version('trl')}, which patch() takes")
        assert sections["Integrations"]["nothing"] == "not installed"
        assert not _patch.replacement

    def test_one_that_replaces_nothing_is_its_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installed, "LIBRARIES", ("transformers", "torch"))
        sections, _ = examine("--no-build")
        assert sections["Integrations"] == {"transformers": version("transformers"), "torch": version("torch")}

"""The package as it is installed: its names, what it imports, and the wheel."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastpref
from fastpref import losses, reference

ROOT = Path(__file__).parents[1]
USE = """
import torch
import fastpref
logits = torch.zeros(1, 3, 3, requires_grad=True)
logps = fastpref.sequence_logprobs(logits, torch.tensor([[0, 1, 2]]))
logps.sum().backward()
print(fastpref.__file__, f"{logps.item():.6f}", f"{logits.grad[0, 0, 1].item():.6f}")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("module", [fastpref, reference, losses], ids=lambda module: module.__name__)
def test_every_public_name_exists_and_has_a_docstring(module: object) -> None:
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value) or inspect.ismodule(value):
            assert len(inspect.getdoc(value) or "") > 20, name


def test_public_functions_document_arguments_results_and_errors() -> None:
    for name in fastpref.__all__:
        function = getattr(fastpref, name)
        if not inspect.isfunction(function):
            continue
        text = inspect.getdoc(function) or ""
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in text, f"{name}: {section}"
        for argument in inspect.signature(function).parameters:
            assert f"    {argument}: " in text, f"{name}: {argument}"


# Functions that compute nothing: they change which forward a model has, or what memory is held.
MANAGING = {"attach", "detach", "release_memory"}


def test_reference_states_every_public_function_that_computes_with_its_signature() -> None:
    functions = {name for name in fastpref.__all__ if inspect.isfunction(getattr(fastpref, name))}
    assert functions >= MANAGING
    for name in functions - MANAGING:
        assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(fastpref, name)), name


def test_the_version_is_stated_once() -> None:
    """`fastpref.__version__` is the source; the package's metadata, the changelog and the citation agree with it."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r'^version = "', pyproject, re.MULTILINE)
    assert 'version = { attr = "fastpref.__version__" }' in pyproject
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(.+?)\] - (?:\d{4}-\d\d-\d\d|Unreleased)$", changelog, re.MULTILINE)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert newest is not None
    assert cited is not None
    assert newest[1] == cited[1] == fastpref.__version__


def test_import_is_light() -> None:
    heavy = {"triton", "transformers", "tokenizers", "matplotlib", "typer", "rich", "trl", "torch.utils.cpp_extension"}
    loaded = run(sys.executable, "-c", "import sys, fastpref; print(*sys.modules)", cwd=ROOT).split()
    assert "fastpref_kernels.ops" in loaded
    assert not heavy & set(loaded)


def test_kernels_do_not_import_fastpref() -> None:
    sources = list((ROOT / "kernels").rglob("*.py"))
    assert len(sources) > 3
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "fastpref"], path


def test_kernels_is_no_package() -> None:
    """An importable `kernels` would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name[0] not in "._"] == [
        "fastpref_kernels"
    ]


def test_nothing_above_the_operators_names_a_device() -> None:
    """PyTorch's dispatcher is the only one: the fused launch of a loss asks `ops`, and nothing else asks at all."""
    for path in (ROOT / "fastpref").rglob("*.py"):
        if {"cli", "testing"} & set(path.parts):
            continue
        for word in ("is_cuda", '"cuda"', "torch.cuda", '"xpu"', "import triton"):
            assert word not in path.read_text(), f"{path}: {word}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree, so that no build folder is left in it, nor one of it is packed."""
    pytest.importorskip("setuptools", minversion="77")  # which pyproject.toml asks of what builds the wheel
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    shutil.copytree(ROOT, tree, ignore=skipped)
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(*command, "--wheel-dir", folder, tree, cwd=folder, PIP_DISABLE_PIP_VERSION_CHECK="1")
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
class TestWheel:
    def test_holds_the_packages_and_nothing_else(self, wheel: Path) -> None:
        names = zipfile.ZipFile(wheel).namelist()
        assert {name.split("/")[0].split("-")[0] for name in names} == {"fastpref", "fastpref_kernels"}
        packed = {name for name in names if ".dist-info/" not in name}
        assert {Path(name).suffix for name in packed} <= {".py", ".cpp", ".h", ".typed"}
        wanted = {
            str(path.relative_to(root))
            for root in (ROOT, ROOT / "kernels")
            for package in root.glob("fastpref*")
            for path in package.rglob("*")
            if path.suffix in (".py", ".cpp", ".h", ".typed")
        }
        assert packed == wanted
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        assert f"\nVersion: {fastpref.__version__}\n" in zipfile.ZipFile(wheel).read(metadata).decode()

    def test_works_from_another_folder(self, wheel: Path, tmp_path: Path) -> None:
        site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
        elsewhere.mkdir()
        zipfile.ZipFile(wheel).extractall(site)
        where, logp, gradient = run(sys.executable, "-c", USE, cwd=elsewhere, PYTHONPATH=str(site)).split()
        assert Path(where) == site / "fastpref" / "__init__.py"
        assert (logp, gradient) == ("-2.197225", "0.666667")  # 2·log(1/3), and 1 − 1/3

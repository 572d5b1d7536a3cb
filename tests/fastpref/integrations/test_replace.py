"""Check and replace objects of an imitated library."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from fastpref.integrations import _replace
from fastpref.integrations._replace import Known, Replacement, parameters_of
from tests.fastpref.integrations import imitations

SOURCES = {
    "lib": "",
    "lib.core": """
def score(x, scale=1.0): return x * scale
class Head:
    def __init__(self, size): ...
    def forward(self, x): ...
""",
    "lib.trainer": """
from lib.core import score
class Trainer:
    def step(self, x): return [score(y) for y in x]
""",
    "library": "from lib.core import score",
}


def score(x: float, scale: float = 1.0) -> float:
    return -x


class Head:
    def __init__(self, size: int) -> None: ...

    def forward(self, x: float) -> None: ...


OBJECTS: dict[str, Any] = {"lib.core:score": score, "lib.core:Head": Head}


def known(**changes: Any) -> Known:
    stated: dict[str, Any] = {
        "parameters": parameters_of(OBJECTS),
        "uses": {"lib.trainer:Trainer.step": ("score",)},
        **changes,
    }
    return Known("our patch", "lib", ">=1.2,<2", **stated)


@pytest.fixture
def lib(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return imitations.install(monkeypatch, SOURCES, "1.5")


def test_parameters_of() -> None:
    assert parameters_of(OBJECTS) == {
        "lib.core:score": ("x", "scale=1.0"),
        "lib.core:Head.__init__": ("self", "size"),
        "lib.core:Head.forward": ("self", "x"),
    }


def test_a_known_library_passes(lib: dict[str, Any]) -> None:
    known().check()
    known(parameters={"lib.core:score": ("x=...", "scale=..."), "lib.core:Head": None}).check()


@pytest.mark.parametrize("version", ["1.1", "1.2rc1", "2.0", "2.1.3"])
def test_another_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imitations.install(monkeypatch, SOURCES, version)
    with pytest.raises(NotImplementedError) as error:
        known().check()
    assert str(error.value) == (
        f"our patch needs lib>=1.2,<2, unmodified; found lib {version}, which is another version. Install a version "
        "that it supports, pip install 'lib>=1.2,<2', or train without it"
    )


def test_a_tested_version_is_recommended(lib: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"needs lib>=1\.2,<2, .*pip install 'lib>=1\.2,<1\.6'"):
        known(tested=">=1.2,<1.6", parameters={"lib.core:tail": None}).check()


@pytest.mark.parametrize("version", ["1.2", "1.9.dev3", "1.3rc1"])
def test_versions_in_the_range_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imitations.install(monkeypatch, SOURCES, version)
    known().check()


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_replace, "version", missing)
    with pytest.raises(ImportError, match=r"our patch needs lib>=1\.2,<2; found no lib\..* pip install 'lib>=1\.2,<2'"):
        known().check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"lib.core:tail": None}}, r"which lacks lib\.core\.tail\."),
        ({"parameters": {"lib.other:score": None}}, r"which lacks lib\.other\.score\."),
        ({"parameters": {"lib.core:score.inner": None}}, r"which lacks lib\.core\.score\.inner\."),
        ({"parameters": {"lib.core:score": ("x", "scale=2.0")}}, r"takes \(x, scale=1\.0\), not \(x, scale=2\.0\)"),
        ({"parameters": {"lib.core:score": ("x", "scale")}}, r"lib\.core\.score takes \(x, scale=1\.0\), not \(x, s"),
        ({"parameters": {"lib.core:score": ("scale=...", "x=...")}}, r"not \(scale=\.\.\., x=\.\.\.\)"),
        ({"parameters": {"lib.core:score": ("x",)}}, r"takes \(x, scale=1\.0\), not \(x\)"),
        ({"uses": {"lib.trainer:Trainer.step": ("score", "Head")}}, r"lib\.trainer\.Trainer\.step does not use Head\."),
    ],
)
def test_a_library_that_differs_is_refused(change: dict[str, Any], message: str, lib: dict[str, Any]) -> None:
    replacement = Replacement(everywhere=True)
    with pytest.raises(NotImplementedError, match=message):
        replacement.apply(known(**change), lambda: OBJECTS)
    assert not replacement
    assert lib["lib.core"].score is lib["lib.trainer"].score is not score


def test_a_missing_dependency_is_no_other_version(lib: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(_replace.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="ray"):
        known().check()


@pytest.mark.parametrize("everywhere", [True, False])
def test_replace_and_undo(everywhere: bool, lib: dict[str, Any]) -> None:
    core, trainer, other = lib["lib.core"], lib["lib.trainer"], lib["library"]
    own, head = core.score, core.Head
    replacement = Replacement(everywhere=everywhere)
    assert replacement.ours("lib.core:score") is None
    with replacement.apply(known(), lambda: OBJECTS):
        assert replacement
        assert replacement.ours("lib.core:score") is core.score is score
        assert core.Head is Head
        assert trainer.score is (score if everywhere else own)
        assert other.score is own  # a package whose name only starts with "lib"
        with replacement.apply(known(), dict):
            pass
        assert core.score is score
    assert (core.score, core.Head, trainer.score) == (own, head, own)
    assert not replacement
    replacement.undo()


@pytest.mark.parametrize("end", [lambda replacement, undo: replacement.undo(), lambda replacement, undo: undo.close()])
def test_another_replacement_is_not_lost(end: Callable[..., None], lib: dict[str, Any]) -> None:
    replacement, core = Replacement(everywhere=True), lib["lib.core"]
    own = core.score
    undo = replacement.apply(known(), lambda: OBJECTS)
    core.score = abs
    with pytest.raises(
        RuntimeError, match=r"lib\.core\.score was replaced again after patch, by <built-in function abs"
    ):
        end(replacement, undo)
    assert core.score is abs
    assert core.Head is Head
    core.score = score
    replacement.undo()
    assert core.score is own

"""Tests of the command line's messages about a missing package and about the demo."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from fastpref import cli


def _exit(monkeypatch: pytest.MonkeyPatch, command: str) -> object:
    monkeypatch.setattr(sys, "argv", ["fastpref", command])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    return raised.value.code


def _missing(name: str) -> Callable[[], Callable[[], None]]:
    def app() -> None:
        raise ModuleNotFoundError(name=name)

    return lambda: app


@pytest.mark.parametrize(("command", "extra"), [("doctor", "cli"), ("bench", "bench")])
def test_a_missing_package_is_one_line(command: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"fastpref: {{}} is not installed: pip install 'fastpref[{extra}]'"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "typer", None)
        assert _exit(patched, command) == line.format("typer")
    monkeypatch.setattr(cli, "_app", _missing("rich.console"))
    assert _exit(monkeypatch, command) == line.format("rich")


def test_a_package_that_no_extra_installs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_app", _missing("fastpref_kernels"))
    with pytest.raises(ModuleNotFoundError):
        cli.main()


@pytest.mark.parametrize("options", [[], ["--quick", "--out", "folder"]])
def test_demo_says_where_it_is(options: list[str]) -> None:
    result = CliRunner().invoke(cli._app(), ["demo", *options])
    assert result.exit_code == 1
    assert "examples/demo" in result.stderr
    assert "make demo ARGS=" in result.stderr
    assert result.stdout == ""

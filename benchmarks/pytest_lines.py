"""Write a line for each test to a file as it ends, with the traceback of one that failed: a pytest plugin.

pytest -p benchmarks.pytest_lines --lines FILE

pytest itself prints tracebacks at the end only, so that a run that is killed has none. Their style is that of --tb.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LONGEST = 60  # lines of a traceback


class Lines:
    """Write to the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the outcome of a test, and of a set-up or tear-down that did not pass."""
        if report.when == "call" or not report.passed:
            self._write(report, report.nodeid if report.when == "call" else f"{report.nodeid} ({report.when})")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write the error of a module that could not be collected."""
        if not report.passed:
            self._write(report, f"{report.nodeid} (collect)")

    def _write(self, report: Any, name: str) -> None:
        reason = _reason(report)
        text = [f"{report.outcome.upper()} {name} {getattr(report, 'duration', 0.0):.2f} s{reason and ': '}{reason}"]
        if report.failed:
            lines = report.longreprtext.splitlines()
            text += [f"    {line}" for line in lines[-LONGEST:]]
        self._file.write("\n".join(text) + "\n")
        self._file.flush()


def _reason(report: Any) -> str:
    """Return the first line of why a test failed or was skipped."""
    found = report.longrepr
    if isinstance(found, tuple):  # of a skipped test: file, line, reason
        text = found[2]
    else:
        text = found.reprcrash.message if getattr(found, "reprcrash", None) else report.longreprtext.strip()
    return text.partition("\n")[0] if report.failed else text.partition("\n")[0].removeprefix("Skipped: ")


class Device:
    """End a worker of pytest-xdist whose device no longer works, which would fail all of its later tests."""

    def __init__(self) -> None:
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note that a test failed."""
        self._failed |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        """Check the device after a test that failed."""
        self._failed = False
        result = yield
        torch = sys.modules.get("torch")
        if self._failed and torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)  # pytest-xdist names the test and starts another worker
        return result


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--lines", type=Path, help="write a line for each test to this file as it ends")


def pytest_configure(config: pytest.Config) -> None:
    """Write in the process that gathers the reports; watch the device in those that run tests for it."""
    path: Path | None = config.getoption("--lines")
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Device())
    elif path is not None:
        config.pluginmanager.register(Lines(path))

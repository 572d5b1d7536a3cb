"""`benchmarks/pytest_lines.py`: the file of a killed run, and a worker whose device broke."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.conftest import ROOT

FAILS = """
import os, signal
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="not now")
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise RuntimeError("no fixture")

def test_set_up(broken):
    pass

def test_fails():
    seen = 41
    assert seen == 42, "one off"
"""
KILLS = (
    FAILS
    + """
def test_kills():
    os.kill(os.getpid(), signal.SIGKILL)
"""
)
BREAKS = """
import sys
from types import SimpleNamespace

torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: None))
sys.modules["torch"] = torch

def test_breaks():
    def raises():
        raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.synchronize = raises
    raises()

def test_after():
    torch.cuda.synchronize()
"""


def run(folder: Path, text: str, *options: str) -> tuple[int, list[str]]:
    """pytest's exit status, and the lines of the file."""
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    lines = folder / "lines.txt"
    plugin = ["-p", "benchmarks.pytest_lines", "--lines", str(lines), "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-summary", *plugin, *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "INTERNALERROR" not in done.stdout, done.stdout
    return done.returncode, lines.read_text().splitlines()


def test_a_killed_run_has_every_line_and_traceback(tmp_path: Path) -> None:
    status, lines = run(tmp_path, KILLS)
    assert status < 0
    heads = [line.split(" ")[:2] for line in lines if not line.startswith(" ")]
    assert heads == [
        ["PASSED", "test_it.py::test_passes"],
        ["SKIPPED", "test_it.py::test_skipped"],
        ["FAILED", "test_it.py::test_set_up"],
        ["FAILED", "test_it.py::test_fails"],
    ]
    assert any(line.endswith(": not now") for line in lines)
    assert any(line.endswith(" s: RuntimeError: no fixture") for line in lines)
    assert any(line.endswith(" s: AssertionError: one off") for line in lines)
    assert "    E   assert 41 == 42" in lines


def test_what_cannot_be_collected_is_a_line(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "import no_such_module\n")
    assert status == 2
    assert lines[0].startswith("FAILED test_it.py (collect)")
    assert any("no_such_module" in line for line in lines)


def test_workers_report_to_one_file(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    status, lines = run(tmp_path, FAILS, "-n", "2")
    assert status == 1
    heads = sorted(" ".join(line.split(" ")[:2]) for line in lines if not line.startswith(" "))
    assert heads == [
        "FAILED test_it.py::test_fails",
        "FAILED test_it.py::test_set_up",
        "PASSED test_it.py::test_passes",
        "SKIPPED test_it.py::test_skipped",
    ]


def test_a_worker_whose_device_broke_runs_no_other_test(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    status, lines = run(tmp_path, BREAKS, "-n", "1")
    assert status == 1
    assert any(line.startswith("FAILED test_it.py::test_breaks") and "illegal memory access" in line for line in lines)
    assert any(line.startswith("PASSED test_it.py::test_after") for line in lines), lines

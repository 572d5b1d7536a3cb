"""One run of the suite's smallest shapes, with broken peers among the others."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import store

ROOT = Path(__file__).parents[2]
SMALLEST = ("--shapes", "smoke", "--rounds", "5", "--peer-file", str(Path(__file__).with_name("broken_peers.py")))


def bench(*arguments: str) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "fastpref", "bench", *arguments]


@dataclass(frozen=True)
class Smoke:
    """What a run wrote, said and returned."""

    folder: Path
    said: str
    status: int
    rows: store.Rows


def run(folder: Path, *arguments: str) -> Smoke:
    """Run the suite on a CPU."""
    command = bench("--device", "cpu", "--out", str(folder), *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    files = list(folder.glob("*.csv"))
    return Smoke(folder, done.stdout + done.stderr, done.returncode, store.read(files[0]) if files else [])


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    return run(tmp_path_factory.mktemp("smoke"), *SMALLEST)

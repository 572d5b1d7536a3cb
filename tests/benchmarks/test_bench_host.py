"""The times of the host, measured on any machine in a few rounds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.benchmarks.conftest import ROOT

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_call_has_a_time() -> None:
    command = [sys.executable, "benchmarks/bench_host.py", "--rounds", "3", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for call in ("a float", "fold of a tile", "dpo_loss", "kto_loss", "plackett_luce_loss"):
        (line, *_) = [line for line in done.stdout.splitlines() if call in line]
        assert "[" in line, line
    assert "triton" in done.stdout, "the versions"

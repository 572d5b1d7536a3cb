"""Runs `launched/` under Triton's interpreter, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
LAUNCHED = Path(__file__).with_name("launched")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in LAUNCHED.glob("test_*.py")))
def test_kernels_under_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(LAUNCHED / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout, result.stdout

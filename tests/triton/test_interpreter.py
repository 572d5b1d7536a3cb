"""Runs `launched/` under Triton's interpreter, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
LAUNCHED = Path(__file__).with_name("launched")


# The long files run in parts, which several workers share.
PARTS = {"test_losses.py": 3, "test_logprobs.py": 4, "test_product.py": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "part"),
    [
        (file, f"{part}/{parts}")
        for file in sorted(path.name for path in LAUNCHED.glob("test_*.py"))
        for parts in [PARTS.get(file, 1)]
        for part in range(parts)
    ],
)
def test_kernels_under_the_interpreter(file: str, part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(LAUNCHED / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "LAUNCHED_PART": part}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout, result.stdout

"""The same script on one process and on two ranks, however they share the work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

EXAMPLE = Path(__file__).parents[2] / "examples" / "dpo_fsdp_tp.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


pytestmark = pytest.mark.slow


def losses(*launcher: str, tp: int = 1) -> tuple[float, float]:
    """The first loss and the last, as the script prints them."""
    command = [sys.executable, *launcher, str(EXAMPLE), "--steps", "6", f"--tp={tp}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"loss on \d × \d ranks: ([\d.]+) at first, ([\d.]+) after 6 steps", done.stdout)
    assert len(found) == 1, done.stdout
    return float(found[0][0]), float(found[0][1])


@pytest.fixture(scope="module")
def one() -> tuple[float, float]:
    return losses()


def test_it_learns(one: tuple[float, float]) -> None:
    assert one[0] == pytest.approx(0.693147, abs=1e-6)  # ln 2: the policy is the reference
    assert one[1] < 0.6


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("tp", [1, 2], ids=["data", "layers and vocabulary"])
def test_two_ranks_train_as_one(tp: int, one: tuple[float, float]) -> None:
    assert losses(*TORCHRUN, tp=tp) == pytest.approx(one, abs=2e-5)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    command = [sys.executable, str(EXAMPLE), "--tp", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert "--tp must divide the ranks, 1" in done.stderr

"""Two ranks of gloo on this machine, held against one process: one launch of torchrun, one test for each check."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

CHECKS = Path(__file__).with_name("checks.py")
RANKS = 2


def check_names() -> list[str]:
    spec = importlib.util.spec_from_file_location("distributed_checks", CHECKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.CHECKS)


if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank, what went wrong in each check: "" where nothing did."""
    out = tmp_path_factory.mktemp("ranks") / "results.json"
    run = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run([*run, CHECKS, out], capture_output=True, text=True, timeout=600, check=False)
    files = [out.with_name(f"{out.name}.{rank}") for rank in range(RANKS)]
    assert all(file.exists() for file in files), done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", check_names())
def test_two_ranks_agree_with_one_process(name: str, results: list[dict[str, str]]) -> None:
    for rank, of_rank in enumerate(results):
        assert of_rank.get(name) == "", f"rank {rank}: {of_rank.get(name, 'it never came so far')}"

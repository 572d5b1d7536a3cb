"""Two gloo ranks on this machine against one process: one torchrun launch for each file, one test for each check."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

FOLDER = Path(__file__).parent
RANKS = 2


def check_names() -> list[tuple[str, str]]:
    """Return the file and the name of every check."""
    sys.path.insert(0, str(FOLDER))
    try:
        ranks = importlib.import_module("ranks")
        found: list[tuple[str, str]] = []
        for file in ("vocabulary", "wrapped"):
            before = len(ranks.CHECKS)
            importlib.import_module(file)
            found += [(file, name) for name in list(ranks.CHECKS)[before:]]
    finally:
        sys.path.remove(str(FOLDER))
    return found


if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, str]]]:
    """Return a function of a file: the error of each of its checks on each rank, "" where there is none."""

    @functools.cache
    def launch(file: str) -> list[dict[str, str]]:
        out = tmp_path_factory.mktemp("ranks") / "results.json"
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        done = subprocess.run(
            [*run, FOLDER / f"{file}.py", out],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        files = [out.with_name(f"{out.name}.{rank}") for rank in range(RANKS)]
        assert all(file.exists() for file in files), done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(file.read_text()) for file in files]

    return launch


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), check_names())
def test_two_ranks_agree_with_one_process(file: str, name: str, results: Callable[[str], list[dict[str, str]]]) -> None:
    for rank, of_rank in enumerate(results(file)):
        assert of_rank.get(name) == "", f"rank {rank}: {of_rank.get(name, 'it never came so far')}"

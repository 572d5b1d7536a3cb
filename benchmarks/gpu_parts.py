"""List the parts of `benchmarks/gpu.sh`: the command of each, its share of the time, and the file of its output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

LOG = "log.txt"
# Exit statuses: this machine has no tool for the part, and torch sees no GPU.
NOT_HERE, NO_GPU = 77, 3


@dataclass(frozen=True)
class Settings:
    """The settings that the command of a part depends on.

    Attributes:
        out: the folder of the results.
        device: "cuda", or "cpu" for a rehearsal on tiny shapes.
        shapes: the shapes of `fastpref bench`.
        seconds: after which the part should end by itself, if it can.
    """

    out: Path
    device: str
    shapes: str
    seconds: int = 1

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU to run on."""
        return self.device == "cpu"

    def lasting(self, seconds: float) -> Settings:
        """Return these settings for a part that may take so long."""
        return replace(self, seconds=max(1, int(seconds)))


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: what `--only` calls it.
        share: its seconds in a run of 540, and its weight in any other run.
        command: returns the command from the settings.
        prints: the file of the output folder that its output goes to.
    """

    name: str
    share: float
    command: Callable[[Settings], list[str]]
    prints: str = LOG


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def _smoke(settings: Settings) -> list[str]:
    return _module("gpu_smoke", "--device", settings.device, "--seconds", str(settings.seconds))


def _sweep(settings: Settings) -> list[str]:
    seconds, out = str(settings.seconds), str(settings.out)
    return _module("gpu_sweep", "--seconds", seconds, "--out", out, "--device", settings.device)


def _tests(settings: Settings) -> list[str]:
    lines = ["-p", "benchmarks.pytest_lines", "--lines", str(settings.out / "tests.txt")]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-summary", "-p", "no:cacheprovider", *lines]
    if settings.rehearsal:
        # All of them would take minutes under Triton's interpreter, which makes NumPy warn.
        command += ["-W", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"]
    if find_spec("xdist") is not None:
        command += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "worksteal"]
    if settings.rehearsal:
        return ["env", "TRITON_INTERPRET=1", *command, "tests/triton/launched/test_losses.py", "-k", "sigmoid"]
    return ["env", "TRITON_INTERPRET=0", *command, "tests/gpu", "tests/triton/launched"]


def _bench(settings: Settings) -> list[str]:
    shapes = "smoke" if settings.rehearsal else settings.shapes
    options = ["--device", settings.device, "--shapes", shapes, "--out", str(settings.out)]
    return [sys.executable, "-m", "fastpref", "bench", "logprobs", "linear", *options]


def _check(settings: Settings) -> list[str]:
    options = ["--device", settings.device, "--jsonl", str(settings.out / "check.jsonl")]
    if settings.rehearsal:
        options += ["--dtype", "bfloat16"]
    return [sys.executable, "-m", "fastpref", "check", "--processes", str(len(os.sched_getaffinity(0))), *options]


# The parts that answer soonest come first, and those that may hang the device come last.
PARTS = (
    Part("smoke", 50, _smoke, "smoke.txt"),
    Part("sweep", 170, _sweep),
    Part("tests", 100, _tests),
    Part("bench", 90, _bench),
    Part("check", 50, _check),
    Part("profile", 30, lambda settings: _module("gpu_profile", settings.device), "profile.txt"),
    Part("sanitizer", 40, lambda settings: _module("gpu_sanitizer", settings.device)),
)

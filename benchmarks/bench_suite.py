"""The suite's shapes for pytest-benchmark: `pytest benchmarks --benchmark-only [--shapes smoke]`.

`fastpref bench` measures the same rows in turns, under both allocators, and keeps them. Here each row is a test of its
own; ours is timed before each of its rounds, so that their ratio is of the same moments.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import harness, suite
from benchmarks.peers import Entry

SUBJECTS = ("logprobs", "linear", "losses")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test an entry, those of a shape one after another: its inputs are made once."""
    points = [
        point
        for subject in SUBJECTS
        for point in suite.points(subject, DEVICE, str(metafunc.config.getoption("shapes")))
        if point.allocator == "default" and "sweep" not in dict(point.axes)
    ]
    cases = [
        (point, entry)
        for point in points
        for entry in suite.MODULES[point.subject].entries(harness.Options(), dict(point.axes))
    ]
    names = [
        f"{point.subject}-{'-'.join(str(value) for _, value in point.axes)}-{entry.name}" for point, entry in cases
    ]
    metafunc.parametrize(("point", "entry"), cases, ids=names, scope="module")


@pytest.fixture(scope="module")
def problem(point: suite.Point) -> harness.Problem:
    return suite.MODULES[point.subject].problem(dict(point.axes), point.device)


def test_step(point: suite.Point, entry: Entry, problem: harness.Problem, benchmark: Any) -> None:
    try:
        row: dict[str, Any] = {}
        timed = harness.checked(problem, entry, point.device, harness.Options(), row)
    except (harness.NotHereError, ModuleNotFoundError) as absent:
        pytest.skip(str(absent))
    benchmark.group = str(point)
    benchmark.extra_info.update(row)
    ours = suite.MODULES[point.subject].entries(harness.Options(), dict(point.axes))[0]
    case, own = (next(iter(cases.values())) for cases in (timed, problem.cases(ours, ours.load())))
    taken: list[float] = []

    def setup() -> None:
        if case.before:
            case.before()
        taken.append(own.seconds(point.device == "cuda"))

    benchmark.pedantic(case.run, setup=setup, rounds=5, warmup_rounds=1)
    benchmark.extra_info["over_fastpref"] = benchmark.stats.stats.median / median(taken[1:])

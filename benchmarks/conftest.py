"""What every benchmark's report states, and what the peers may do that our own tests may not."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # peers warn


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine.provenance("cpu"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", default="default", help="smoke, default, full or axes, as of fastpref bench")

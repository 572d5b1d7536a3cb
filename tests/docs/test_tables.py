"""Test that the tables of the documents are those that docs/tables.py makes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from fastpref_kernels import contract

ROOT = Path(__file__).parents[2]


def test_tables_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for path in tables.FILES:
        assert path.read_text() == tables.updated(path), f"{path.name}: run python docs/tables.py"


def test_the_table_of_statistics_is_complete() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text()
    section = page.partition("## Statistics")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`.* \| ([^|]+) \| (yes|no) \|$", section, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(contract.LINEAR_STATISTICS)
    for name, dtype, differentiable in rows:
        statistic = contract.LINEAR_STATISTICS[name]
        assert (dtype == "bool") == bool(statistic & contract.BOOLEAN), name
        assert (differentiable == "yes") == bool(statistic & contract.DIFFERENTIABLE), name

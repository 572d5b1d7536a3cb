"""Tests that every row of the losses' tables has an example, and that `import fastpref` loads none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpref import losses
from fastpref.testing.examples import EXAMPLES

ROOT = Path(__file__).parents[3]
ROWS = (*losses.TABLE, *losses.RLHF)
IMPORT = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "kernels")]}
import fastpref
from fastpref import losses
assert losses.TABLE
print(*(name for name in sys.modules if name.startswith("fastpref")))
"""


def test_every_row_has_an_example_and_every_example_a_row() -> None:
    assert set(EXAMPLES) == {row.name for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_example_is_a_call_of_its_function(row: losses.Entry) -> None:
    tensors, options = row.example(torch.Generator().manual_seed(0), 5)
    assert all(tensor.shape[0] == 5 for tensor in tensors)
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    given = row.options if isinstance(row, losses.Loss) else {}
    row.reference(*tensors, **options, **given)


def test_import_loads_no_test_data() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "fastpref.losses.table" in loaded
    assert not [name for name in loaded if name.startswith("fastpref.testing")]

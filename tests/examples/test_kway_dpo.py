"""The example as a user runs it, with fewer steps."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "kway_dpo.py"


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[float, float]:
    """Held-out ranking accuracy before and after, in percent."""
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    found = re.search(r"held-out ranking accuracy: ([\d.]+)% before, ([\d.]+)% after", printed)
    assert found, printed
    return float(found[1]), float(found[2])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("loss", ["ranking", "plackett-luce"])
def test_held_out_accuracy_rises(
    loss: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)  # as fast as two on a model so small
    before, after = run(capsys, monkeypatch, "--loss", loss, "--steps", "25")
    assert before == 50
    assert after > 80

"""Writes the tables that documents hold between two comments, from where their rows are stated.

Those of losses, in the README and `losses.md`, from `fastpref.losses`; that of `compatibility.md` from its tests; those
of figures, in the README and `scaling.md`, from what was measured; those of `kernels/index.md`, from what machine code
predicts.

python docs/tables.py
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

from benchmarks import suite
from benchmarks.report import data, predicted, tables
from fastpref.losses import RLHF, TABLE, Entry, Loss

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "tests" / "fastpref" / "test_compatibility.py"


def _call(entry: Entry) -> str:
    kind = entry.options.get("loss_type") if isinstance(entry, Loss) else None
    return f"`{entry.function.__name__}`" if kind is None else f'`dpo_loss(loss_type="{kind}")`'


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _paper(entry: Entry) -> str:
    return f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})"


def names() -> str:
    """Name, paper and meaning of every loss."""
    lines = ["| loss | paper | meaning |", "|---|---|---|"]
    lines += [f"| {_call(entry)} | {_paper(entry)} | {_cell(entry.meaning)} |" for entry in (*TABLE, *RLHF)]
    return "\n".join(lines) + "\n"


def formulas() -> str:
    """Formula, derivative and options of every loss."""
    lines = ["| loss | of one element | partial derivatives | options |", "|---|---|---|---|"]
    for loss in TABLE:
        takes = ", ".join(f"`{name}`" for name in loss.takes)
        lines.append(f"| {_call(loss)} | {_cell(loss.formula)} | {_cell(loss.derivative)} | {takes} |")
    lines += ["", "| of PPO | of one token | paper |", "|---|---|---|"]
    lines += [f"| {_call(entry)} | {_cell(entry.formula)} | {_paper(entry)} |" for entry in RLHF]
    return "\n".join(lines) + "\n"


def load(path: Path) -> Any:
    """The module in a file that no package holds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compatibility() -> str:
    """What was tried, a table a section, and what came of it with every kind of function."""
    tests = load(CELLS)
    lines: list[str] = []
    for section, rows in tests.SECTIONS.items():
        lines += [f"## {section}", "", f"| | {' | '.join(tests.COLUMNS)} |", "|---" * (1 + len(tests.COLUMNS)) + "|"]
        lines += [f"| {row.what} | {' | '.join(map(_cell, row.verdicts()))} |" for row in rows]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def measured(make: Callable[[Any], str], device: str = "cpu") -> Callable[[], str]:
    """A table of the figures of the machine with most of them; a sentence where there is none."""

    def text() -> str:
        found = [machine for machine in data.machines(suite.RESULTS) if machine.device == device]
        if not found:
            return "Not measured yet.\n"
        return make(max(found, key=lambda machine: len(machine.rows)))

    return text


# The tables of every document, by the name in the comments around each.
FILES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {
        "losses": names,
        "logprobs": measured(tables.readme_logprobs),
        "linear": measured(tables.readme_linear),
        "trainers": measured(tables.readme_trainers),
        "gae": measured(tables.gae),
    },
    ROOT / "docs" / "index.md": {"memory": measured(tables.memory)},
    ROOT / "docs" / "losses.md": {"losses": formulas},
    ROOT / "docs" / "kernels" / "index.md": {
        "logits": lambda: predicted.logits(predicted.read(suite.RESULTS)),
        "tiles": lambda: predicted.tiles(predicted.read(suite.RESULTS)),
    },
    ROOT / "docs" / "kernels" / "gae.md": {"gae": measured(tables.gae)},
    ROOT / "docs" / "compatibility.md": {"compatibility": compatibility},
    ROOT / "docs" / "scaling.md": {"scaling": measured(tables.scaling)},
}


def updated(path: Path) -> str:
    """A file's text with its tables as they are now."""
    text = path.read_text()
    for name, make in FILES[path].items():
        begin, end = f"<!-- {name}: made by docs/tables.py -->", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        if len(re.findall(pattern, text, re.DOTALL)) != 1:
            raise ValueError(f"{path} must hold one table, between {begin!r} and {end!r}")
        made = f"{begin}\n\n{make()}\n{end}"
        text = re.sub(pattern, lambda _, made=made: made, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for path in FILES:
        path.write_text(updated(path))

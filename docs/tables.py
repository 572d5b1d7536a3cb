"""Write the generated tables of the documentation, each between two comments that name it.

The tables of losses come from `fastpref.losses`, those of `compatibility.md` from its tests, those of measurements from
`benchmarks/results`, and those of `kernels/index.md` from the predictions of the static roofline.

    python docs/tables.py
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from functools import partial
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


def names(_: Path) -> str:
    """Return the table of every loss with its paper and its meaning."""
    lines = ["| loss | paper | meaning |", "|---|---|---|"]
    lines += [f"| {_call(entry)} | {_paper(entry)} | {_cell(entry.meaning)} |" for entry in (*TABLE, *RLHF)]
    return "\n".join(lines) + "\n"


def formulas(_: Path) -> str:
    """Return the tables of every loss with its formula, derivatives and options."""
    lines = ["| loss | formula of one element | partial derivatives | options |", "|---|---|---|---|"]
    for loss in TABLE:
        takes = ", ".join(f"`{name}`" for name in loss.takes)
        lines.append(f"| {_call(loss)} | {_cell(loss.formula)} | {_cell(loss.derivative)} | {takes} |")
    lines += ["", "| function of PPO | formula of one token | paper |", "|---|---|---|"]
    lines += [f"| {_call(entry)} | {_cell(entry.formula)} | {_paper(entry)} |" for entry in RLHF]
    return "\n".join(lines) + "\n"


def load(path: Path) -> Any:
    """Return the module in a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compatibility(_: Path) -> str:
    """Return a table for each section of the compatibility tests: a row a case, a column a kind of function."""
    tests = load(CELLS)
    lines: list[str] = []
    for section, rows in tests.SECTIONS.items():
        lines += [f"## {section}", "", f"| | {' | '.join(tests.COLUMNS)} |", "|---" * (1 + len(tests.COLUMNS)) + "|"]
        lines += [f"| {row.what} | {' | '.join(map(_cell, row.verdicts()))} |" for row in rows]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def measured(make: Callable[[data.Machine], str]) -> Callable[[Path], str]:
    """Return a function that makes a table of the first machine of a folder, or a sentence if it has no rows."""

    def text(results: Path) -> str:
        found = data.machines(results)
        return (make(found[0]) if found else "") or "Not measured yet.\n"

    return text


def predictions(make: Callable[[predicted.Rows], str]) -> Callable[[Path], str]:
    """Return a function that makes a table of a folder's predictions, or a sentence if there are none."""

    def text(results: Path) -> str:
        rows = predicted.read(results)
        return make(rows) if rows else "Not predicted yet.\n"

    return text


# The tables of every page, by the name in the comments around each table.
FILES: dict[Path, dict[str, Callable[[Path], str]]] = {
    ROOT / "README.md": {"headline": measured(tables.headline)},
    ROOT / "docs" / "benchmarks.md": {
        "logprobs": measured(partial(tables.summary, subject="logprobs")),
        "logprobs-shapes": measured(partial(tables.shapes, subject="logprobs")),
        "linear": measured(partial(tables.summary, subject="linear")),
        "linear-shapes": measured(partial(tables.shapes, subject="linear")),
        "trainers": measured(tables.trainers),
        "trainers-thp": measured(partial(tables.trainers, allocator="THP")),
        "gae": measured(partial(tables.losses, advantages=True)),
        "losses": measured(tables.losses),
        "scaling": measured(tables.scaling),
        "predicted": predictions(predicted.logits),
        "predicted-everything": predictions(predicted.everything),
        "machine": measured(tables.versions),
        "absent": measured(tables.absent),
        "others": lambda results: tables.others(data.machines(results)[1:]),
    },
    ROOT / "docs" / "index.md": {"memory": measured(tables.memory)},
    ROOT / "docs" / "losses.md": {"losses": names, "formulas": formulas},
    ROOT / "docs" / "kernels" / "index.md": {
        "logits": predictions(predicted.logits),
        "tiles": predictions(predicted.tiles),
    },
    ROOT / "docs" / "kernels" / "gae.md": {"gae": measured(partial(tables.losses, advantages=True))},
    ROOT / "docs" / "compatibility.md": {"compatibility": compatibility},
    ROOT / "docs" / "scaling.md": {"scaling": measured(tables.scaling)},
}


def updated(path: Path, results: Path = suite.RESULTS) -> str:
    """Return a page's text with its tables up to date."""
    text = path.read_text()
    for name, make in FILES[path].items():
        begin, end = f"<!-- {name}: made by docs/tables.py -->", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        if len(re.findall(pattern, text, re.DOTALL)) != 1:
            raise ValueError(f"{path} must hold one table between {begin!r} and {end!r}")
        made = f"{begin}\n\n{make(results)}\n{end}"
        text = re.sub(pattern, lambda _, made=made: made, text, flags=re.DOTALL)
    return text


def write(results: Path = suite.RESULTS) -> None:
    """Replace the tables of every document."""
    for path in FILES:
        path.write_text(updated(path, results))


if __name__ == "__main__":
    write()

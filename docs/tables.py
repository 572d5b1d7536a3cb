"""Writes the tables of losses that the README and `losses.md` hold, from `fastpref.losses`' own.

python docs/tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from fastpref.losses import RLHF, TABLE, Entry, Loss

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- losses: made by docs/tables.py -->", "<!-- end of losses -->"


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


FILES = {ROOT / "README.md": names, ROOT / "docs" / "losses.md": formulas}


def updated(path: Path) -> str:
    """A file's text with its table as it is now."""
    text = path.read_text()
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    if len(re.findall(pattern, text, re.DOTALL)) != 1:
        raise ValueError(f"{path} must hold one table, between {BEGIN!r} and {END!r}")
    return re.sub(pattern, lambda _: f"{BEGIN}\n\n{FILES[path]()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in FILES:
        path.write_text(updated(path))

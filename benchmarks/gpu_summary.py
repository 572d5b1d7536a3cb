"""Summarise the output folder of `benchmarks/gpu.sh`: python -m benchmarks.gpu_summary DIR.

The run may have been killed, so files may be absent and the last line of each may be incomplete.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gpu_evidence
from benchmarks.gpu_evidence import Failure
from benchmarks.gpu_parts import LOG

LONGEST = 60  # lines of the page
GROUPS = 4  # failures of a part that are named
WIDEST = 180  # characters of a reason
BAD = ("failed", "out of time", "interrupted", "killed")


@dataclass
class State:
    """The state of a part in `log.txt`, its seconds, and the lines that it printed there."""

    state: str = "not reached"
    seconds: str = ""
    said: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        """Whether the part did not end well."""
        return self.state.startswith(BAD)


def states(folder: Path) -> dict[str, State]:
    """Return the state of every part that was planned, from the lines of `log.txt` that begin with "== "."""
    found: dict[str, State] = {}
    running = ""
    for line in gpu_evidence.lines(folder / LOG):
        match = re.fullmatch(r"== (\w+): (.*)", line)
        name, text = match.groups() if match else ("", "")
        if name == "parts":
            found |= {part: State() for part in text.split() if part not in found}
        elif text.startswith("started"):
            found[name], running = State("killed"), name
        elif name == running and (ended := re.fullmatch(r"(.*) in ([\d.]+) s", text)):
            found[name].state, found[name].seconds = ended.groups()
            running = ""
        elif running:
            found[running].said += (line,)
    return found


def machine(folder: Path) -> str:
    """Return the line of `log.txt` about the machine."""
    said = [line for line in gpu_evidence.lines(folder / LOG) if line.startswith("== machine: ")]
    return said[-1].removeprefix("== machine: ") if said else "The machine is not known."


def failures(folder: Path, parts: dict[str, State]) -> list[str]:
    """Return a line for each part and reason of failure, with the number of cases and the first of them."""
    text = []
    for name, state in parts.items():
        found = gpu_evidence.FAILURES[name](folder, state.said) if name in gpu_evidence.FAILURES else []
        if not found and state.bad:
            said = [line for line in state.said or gpu_evidence.lines(folder / f"{name}.txt") if line.strip()]
            found = [Failure(state.state, f"it printed last: {said[-1]}" if said else "it printed nothing")]
        groups: dict[str, list[Failure]] = {}
        for failure in found:
            # Reasons that differ only in numbers count as one.
            groups.setdefault(re.sub(r"\d[\d.e+-]*", "#", failure.reason), []).append(failure)
        ordered = sorted(groups.values(), key=len, reverse=True)
        for group in ordered[:GROUPS]:
            first = group[0]
            times = f"{len(group)} × " if len(group) > 1 else ""
            case = f"{first.case}: " if first.case else ""
            text.append(f"- **{name}**: {times}{case}{first.reason[:WIDEST]}")
        if rest := sum(map(len, ordered[GROUPS:])):
            text.append(f"- **{name}**: {rest} more of {len(ordered) - GROUPS} other kinds")
    return text


def table(folder: Path, parts: dict[str, State]) -> list[str]:
    """Return the lines of the table of parts."""
    text = ["| part | state | seconds | counts |", "|---|---|---:|---|"]
    for name, state in parts.items():
        counts = gpu_evidence.COUNTS[name](folder, state.said) if name in gpu_evidence.COUNTS else Counter()
        shown = ", ".join(f"{number} {what}" for what, number in counts.items())
        text.append(f"| {name} | {state.state.replace('|', '/')} | {state.seconds} | {shown} |")
    return text


def page(folder: Path) -> str:
    """Return the page: failures, parts, and as many figures as fit."""
    parts = states(folder)
    wrong = failures(folder, parts)
    text = ["# GPU run", "", machine(folder), ""]
    text += ["## Failures", "", *(wrong or ["None."]), "", "## Parts", "", *table(folder, parts)]
    figures = gpu_evidence.figures(folder)
    room = LONGEST - len(text) - 3
    if figures and room > 0:
        text += ["", "## Figures", "", *figures[:room]]
    return "\n".join(text[:LONGEST]) + "\n"


def write(folder: Path) -> str:
    """Write `summary.md` and return it."""
    text = page(folder)
    (folder / "summary.md").write_text(text)
    return text


def status(folder: Path) -> int:
    """Return 1 if a part failed, ran out of time or was ended, 0 otherwise."""
    return int(any(state.bad for state in states(folder).values()))


if __name__ == "__main__":
    print(write(Path(sys.argv[1])), end="")

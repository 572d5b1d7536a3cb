"""How each kind of code block of the documentation is run: Python, shell, and the text that a block prints."""

from __future__ import annotations

import io
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from packaging.requirements import Requirement
from sybil import Document, Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"--8<--\n(.+)\n--8<--\n?")  # in lines of their own: in one it is Python, and would be formatted
# Commands that answer in seconds. Of all others it is seen that they exist and take the arguments.
RUN = ("doctor", "check")
# A script that writes to these pages: what it would write is `test_tables.py`'s to hold.
WRITES = "docs/tables.py"

_evaluate = PythonEvaluator()
_done: set[tuple[str, ...]] = set()  # commands that several pages show are run once


def python(example: Example) -> None:
    """Run a block in its page's namespace; a block that is a file of the repository, as that file without its main."""
    example.namespace.setdefault("__name__", "page")
    printed = io.StringIO()
    file = SNIPPET.fullmatch(example.parsed)
    with redirect_stdout(printed):
        if file:
            runpy.run_path(str(ROOT / file[1]), run_name="shown")
        else:
            _evaluate(example)
    if not _is_hidden(example):
        example.namespace["__printed__"] = printed.getvalue()


def text(example: Example) -> str | None:
    """What the block before printed: the same words, and numbers that another machine may round otherwise."""
    wanted, found = (x.split() for x in (str(example.parsed), example.namespace.pop("__printed__", "")))
    if len(wanted) == len(found) and all(map(_alike, wanted, found)):
        return None
    return f"the page says\n{example.parsed}\nand the block before prints\n{' '.join(found)}"


def _alike(wanted: str, found: str) -> bool:
    """The same, or numbers: errors, which have an exponent, within a factor of 8, others within 1%."""
    if wanted == found:
        return True
    try:
        a, b = float(wanted), float(found)
    except ValueError:
        return False
    if "e-" in wanted:
        return a * b > 0 and abs(math.log(a / b)) < math.log(8)
    return math.isclose(a, b, rel_tol=1e-2)


def shell(example: Example) -> str | None:
    """Run each line, or see that it could be run; the first that could not is the failure."""
    lines = str(example.parsed).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words:
            fault = _command(*words)
            if fault:
                return f"{line}\n{fault}"
    return None


def _command(program: str, *arguments: str) -> str | None:
    if (program, *arguments) in _done:
        return None
    fault = _COMMANDS.get(program, _unknown)(*arguments)
    if fault is None:
        _done.add((program, *arguments))
    return fault


def _unknown(*arguments: str) -> str:
    return f"no evaluator knows this command; {', '.join(_COMMANDS)} are known"


def _process(*command: str) -> str | None:
    # Threads that wait for each other on cores that others use take ten times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, env=environment
    )  # fmt: skip
    return None if done.returncode == 0 else done.stdout + done.stderr


def _make(*targets: str) -> str | None:
    return _process("make", "--dry-run", *targets)


def _pip(action: str, *packages: str) -> str | None:
    """Every name is a requirement, and every extra of fastpref's one that it has."""
    if action != "install":
        return f"what pip {action} would do is not known here"
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^([a-z]+) = \[$", table, re.MULTILINE)
    for package in packages:
        wanted = Requirement(re.sub(r"^\.(?=$|\[)", "fastpref", package))
        if wanted.name == "fastpref" and not wanted.extras <= set(extras):
            return f"fastpref has the extras {', '.join(extras)}"
    return None


def _fastpref(*arguments: str) -> str | None:
    if arguments[0] in RUN:
        return _process(sys.executable, "-c", "from fastpref.cli import main; main()", *arguments)
    from typer.main import get_command

    from fastpref.cli import _app

    group: Any = get_command(_app())
    command = group.get_command(None, arguments[0])
    if command is None:
        return f"fastpref has no {arguments[0]}"
    try:
        command.make_context(arguments[0], list(arguments[1:]))
    except Exception as error:
        if not hasattr(error, "format_message"):  # what a command line refuses, by typer's own click or another
            raise
        return error.format_message()
    return None


def _python(script: str, *arguments: str) -> str | None:
    """In this process, which has imported what takes most of a script's time."""
    if script == WRITES:
        return None if (ROOT / script).exists() else f"there is no {script}"
    with mock.patch.object(sys, "argv", [script, *arguments]), redirect_stdout(io.StringIO()):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return None


def _torchrun(*arguments: str) -> str | None:
    """What several ranks run has a test of its own, which starts them and holds them against one."""
    from torch.distributed.run import get_args_parser

    script = Path(get_args_parser().parse_args(arguments).training_script)
    held = ROOT / "tests" / "examples" / f"test_{script.name}"
    if (ROOT / script).exists() and held.exists() and "torch.distributed.run" in held.read_text():
        return None
    return f"{script} must exist, and {held} start it"


def _bash(script: str, *arguments: str) -> str | None:
    return _process("bash", "-n", script)


_COMMANDS = {"bash": _bash, "fastpref": _fastpref, "make": _make, "pip": _pip, "python": _python, "torchrun": _torchrun}
_EVALUATORS: dict[str, Any] = {"python": python, "bash": shell, "text": text}
_SYBIL = Sybil([CodeBlockParser(language, evaluator) for language, evaluator in _EVALUATORS.items()])


def _is_hidden(example: Example) -> bool:
    """Whether it is in a comment, which readers do not see."""
    return example.document.text.startswith("<!--", example.start)


def parse(page: Path) -> tuple[Document, list[Example]]:
    """A page and all its blocks that have an evaluator, in their order."""
    document = _SYBIL.parse(page)
    return document, list(document.examples())


def visible(examples: list[Example]) -> list[Example]:
    """Those that readers see."""
    return [example for example in examples if not _is_hidden(example)]

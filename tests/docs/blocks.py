"""Run the code blocks of the documentation: Python, shell, and the text that a block prints."""

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
SNIPPET = re.compile(r"--8<--\n(.+)\n--8<--\n?")  # on three lines: on one, a formatter would read it as Python
# Commands that take seconds. All others are only checked to exist and to accept their arguments.
RUN = ("doctor", "check")
# A script that writes to these pages, and is not run: `test_tables.py` tests what it would write.
WRITES = "docs/tables.py"

_evaluate = PythonEvaluator()
_done: set[tuple[str, ...]] = set()  # commands that several pages show are run once


def python(example: Example) -> None:
    """Run a block in the namespace of its page. Run a block that includes a file as that file, without its main."""
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
    """Compare with the output of the previous block: equal words, and numbers up to the rounding of another machine."""
    wanted, found = (x.split() for x in (str(example.parsed), example.namespace.pop("__printed__", "")))
    if len(wanted) == len(found) and all(map(_alike, wanted, found)):
        return None
    return f"the page says\n{example.parsed}\nand the block before prints\n{' '.join(found)}"


def _alike(wanted: str, found: str) -> bool:
    """Return whether words are equal, or numbers that agree to 1%, or to a factor of 8 if written with an exponent."""
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
    """Run each command, or check that it could run. Return the fault of the first that fails."""
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, env=environment)
    return None if done.returncode == 0 else done.stdout + done.stderr


def _make(*targets: str) -> str | None:
    return _process("make", "--dry-run", *targets)


def _pip(action: str, *packages: str) -> str | None:
    """Check that every argument is a requirement, and that every extra of fastpref exists."""
    if action != "install":
        return f"only pip install is known here; got pip {action}"
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
        if not hasattr(error, "format_message"):  # an error of the command line, of typer or click
            raise
        return error.format_message()
    return None


def _python(script: str, *arguments: str) -> str | None:
    """Run a script in this process, which has already imported what takes most of its time."""
    if script == WRITES:
        return None if (ROOT / script).exists() else f"there is no {script}"
    with mock.patch.object(sys, "argv", [script, *arguments]), redirect_stdout(io.StringIO()):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return None


def _torchrun(*arguments: str) -> str | None:
    """Check that the script has a test that starts its ranks."""
    from torch.distributed.run import get_args_parser

    script = Path(get_args_parser().parse_args(arguments).training_script)
    held = ROOT / "tests" / "examples" / f"test_{script.name}"
    if (ROOT / script).exists() and held.exists() and "torch.distributed.run" in held.read_text():
        return None
    return f"{script} must exist, and {held} must start it with torchrun"


def _bash(script: str, *arguments: str) -> str | None:
    return _process("bash", "-n", script)


_COMMANDS = {"bash": _bash, "fastpref": _fastpref, "make": _make, "pip": _pip, "python": _python, "torchrun": _torchrun}
_EVALUATORS: dict[str, Any] = {"python": python, "bash": shell, "text": text}
_SYBIL = Sybil([CodeBlockParser(language, evaluator) for language, evaluator in _EVALUATORS.items()])


def _is_hidden(example: Example) -> bool:
    """Return whether a block is in a comment, which readers do not see."""
    return example.document.text.startswith("<!--", example.start)


def parse(page: Path) -> tuple[Document, list[Example]]:
    """Return a page and all its blocks that have an evaluator, in order."""
    document = _SYBIL.parse(page)
    return document, list(document.examples())


def visible(examples: list[Example]) -> list[Example]:
    """Return the blocks that readers see."""
    return [example for example in examples if not _is_hidden(example)]

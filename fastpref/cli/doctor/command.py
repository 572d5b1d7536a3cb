"""The `doctor` command: its options and its exit status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastpref.cli.doctor.section import Section


def doctor(
    build: Annotated[bool, typer.Option(help="Build the C++ operators if they are not built yet.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")] = False,
) -> None:
    """Report what runs on this machine and why, what is missing, what that costs, and the command that fixes it.

    The exit status is 1 if something is missing that a user would expect: a C++ compiler and operators that build, a
    new enough torch, a writable cache, and, with a GPU, a new enough Triton and a torch that can use the GPU.
    """
    import contextlib
    import json
    import sys

    from rich.console import Console

    from fastpref.cli.doctor import report

    # Libraries that print while they are imported must not write to stdout.
    with contextlib.redirect_stdout(sys.stderr):
        sections = _examine(build)
    found = report.as_object(sections)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        report.show(sections, Console())
    if not found["ok"]:
        raise typer.Exit(1)


def _examine(may_build: bool) -> list[Section]:
    from fastpref.cli.doctor import devices, installed, native

    gpus, types, has_gpu = devices.gpu_section()
    triton = installed.triton_section(has_gpu)
    operators, row_pass = native.native_section(may_build)
    return [
        installed.python_section(),
        installed.torch_section(),
        gpus,
        triton,
        operators,
        devices.operators_section(types, row_pass),
        installed.integrations_section(),
        installed.environment_section(),
    ]

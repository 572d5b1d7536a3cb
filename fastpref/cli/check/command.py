"""The `check` command: its options, its errors and its exit status."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastpref.cli.stdout import stdout_on_stderr

if TYPE_CHECKING:
    import torch

    from fastpref.cli.check.run import Result
    from fastpref.testing.case import Case


def check(
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="A device, such as cpu; may be repeated.", show_default="cpu, and the accelerator if there is one"
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="A dtype, such as bfloat16; may be repeated.", show_default="every floating dtype"),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Part of the names of cases, or a glob such as 'dpo_loss:*/mean'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print a line for every value and gradient.")] = False,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, writable=True, help="A file to write each result to as a JSON line, as soon as it is known."
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Run the cases in this many processes; a case that crashes its process counts as failed.",
            show_default="in the current process",
        ),
    ] = 0,
) -> None:
    """Check every operator and every loss against float64, values and gradients, on this machine's devices.

    An error is the largest difference from plain PyTorch in float64 on the same inputs. The check allows twice the
    error of plain PyTorch in the same dtype, plus 4 units in the last place. Every call is made twice, and must give
    the same bits. The exit status is 1 if an error is larger, if two runs differ, or if a call raises.
    """
    from fastpref.cli.check.run import chosen_cases

    devices, dtypes = _devices(device), _dtypes(dtype)
    cases = chosen_cases(only)
    if not cases:
        raise typer.BadParameter(f"no case is called {only!r}", param_hint="--only")
    jobs = [
        (case, where, kind)
        for case in cases
        for where in devices
        if case.runs_on(where)
        for kind in dtypes
        if kind in case.dtypes
    ]
    results = _run(jobs, devices, as_json, verbose, jsonl, processes)
    if any(result.fault is not None for result in results):
        raise typer.Exit(1)


def _devices(names: list[str] | None) -> list[torch.device]:
    # This import takes seconds; --help and a mistyped option do not wait for it.
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if names is None:
        return [torch.device("cpu"), *([] if accelerator is None else [torch.device(accelerator.type)])]
    devices = []
    for name in names:
        try:
            found = torch.device(name)
        except RuntimeError:
            raise typer.BadParameter(f"{name!r} is no device", param_hint="--device") from None
        if found.type not in {"cpu", accelerator and accelerator.type}:
            raise typer.BadParameter(f"torch finds no {found.type} here; see fastpref doctor", param_hint="--device")
        devices.append(found)
    return list(dict.fromkeys(devices))


def _dtypes(names: list[str] | None) -> list[torch.dtype]:
    from fastpref.cli.check.run import name_of
    from fastpref.testing.case import DTYPES

    known = {name_of(dtype): dtype for dtype in DTYPES}
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--dtype")
    return [known[name] for name in dict.fromkeys(names or known)]


def _run(
    jobs: list[tuple[Case, torch.device, torch.dtype]],
    devices: list[torch.device],
    as_json: bool,
    verbose: bool,
    jsonl: Path | None,
    processes: int,
) -> list[Result]:
    import contextlib
    import json
    import time

    from rich.console import Console
    from rich.live import Live

    from fastpref.cli.check import report, run, workers

    console = Console()
    rows = report.Rows(dict.fromkeys((case.row, str(where)) for case, where, _ in jobs))
    with contextlib.ExitStack() as stack:
        if as_json:
            stack.enter_context(stdout_on_stderr())
        # The first call may build the C++ operators and print a message, which belongs before the table, not inside it.
        for where in devices:
            report.name_of_device(where)
        shown = not as_json and console.is_terminal
        live = stack.enter_context(Live(rows.table(), console=console)) if shown else None
        lines = None if jsonl is None else stack.enter_context(jsonl.open("w", encoding="utf-8"))
        start, results = time.perf_counter(), []
        for found in workers.in_processes(jobs, processes) if processes else (run.run(*job) for job in jobs):
            results += found
            rows.add(found)
            if lines is not None:
                lines.writelines(f"{json.dumps(report.record(x), ensure_ascii=False)}\n" for x in found)
                lines.flush()
            if live is not None:
                live.update(rows.table())
        seconds = time.perf_counter() - start
    if as_json:
        typer.echo(json.dumps(report.as_json(results, devices, seconds), ensure_ascii=False, allow_nan=False))
        return results
    if not shown:
        console.print(rows.table())
    for where in devices:
        console.print(f"{where}: {report.name_of_device(where)}", highlight=False)
    report.summarise(results, seconds, verbose, console)
    return results

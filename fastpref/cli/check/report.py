"""Show the results of the check as a table, as lines, and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpref.cli.check.run import Result
from fastpref.cli.doctor.installed import installed
from fastpref.cli.doctor.native import bf16_products
from fastpref_kernels import cpu


class Rows:
    """The results so far, as a table with the worst of every function and device."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self._results: dict[tuple[str, str], list[Result]] = {row: [] for row in rows}

    def add(self, results: Sequence[Result]) -> None:
        """Add the results of one call in one dtype."""
        for result in results:
            self._results[result.case.row, result.device].append(result)

    def table(self) -> Table:
        """Return the table of the results so far."""
        table = Table(title="Error as a share of what is allowed: the worst of each", title_justify="left")
        table.add_column("function", no_wrap=True)
        for column in ("device", "values", "gradients"):
            table.add_column(column)
        for (function, device), results in self._results.items():
            raised = next((result for result in results if not result.output), None)
            if raised is not None:
                table.add_row(escape(function), device, f"[red]{escape(_first_line(raised))}", "")
                continue
            values, gradients = ([x for x in results if x.is_gradient is wanted] for wanted in (False, True))
            table.add_row(escape(function), device, _worst(values), _worst(gradients))
        return table


def _worst(results: Sequence[Result]) -> str:
    if not results:
        return ""
    # A fault without a number, such as a wrong shape, is worse than any number.
    worst = max(results, key=lambda x: (x.fault is not None, x.fault is not None and x.error is None, x.share))
    if worst.fault is None:
        return f"{worst.share:.2f} {worst.dtype}"
    return f"[red]{f'{worst.share:.3g}' if worst.share > 1 else 'wrong'} {worst.dtype}"


def _first_line(result: Result) -> str:
    return (result.fault or "").partition("\n")[0][:100]


def describe(result: Result) -> str:
    """Describe a result in one line."""
    where = f"{result.case.name}, {result.device}, {result.dtype}{result.output and ': '}{result.output}"
    if result.error is None:
        found = "" if result.fault is None else f": {result.fault}"
    else:
        found = f": {result.error:.1e} of {result.allowance:.1e} allowed"
        found += "" if result.fault is None else f": {result.fault}"
    return where + found


def summarise(results: Sequence[Result], seconds: float, verbose: bool, console: Console) -> None:
    """Print every wrong result and a summary; with `verbose`, first print every result."""
    if verbose:
        for result in results:
            console.print(escape(describe(result)), highlight=False)
    wrong = [result for result in results if result.fault is not None]
    for result in wrong:
        console.print(f"[red]wrong[/red] {escape(describe(result))}", highlight=False)
    calls = len({(result.case.name, result.device, result.dtype) for result in results})
    ending = f"{len(wrong)} are wrong" if wrong else "all are within 2 × eager's error + 4 ulp, and two runs agree"
    console.print(f"{len(results)} tensors of {calls} calls: {ending}. {seconds:.0f} s.", highlight=False)


def as_json(results: Sequence[Result], devices: Sequence[torch.device], seconds: float) -> dict[str, Any]:
    """Return versions, devices and all results in a form that JSON can hold."""
    return {
        "ok": all(result.fault is None for result in results),
        "versions": versions(),
        "devices": {str(device): name_of_device(device) for device in devices},
        "seconds": round(seconds, 1),
        "cases": [record(result) for result in results],
    }


def record(result: Result) -> dict[str, Any]:
    """Return one result in a form that JSON can hold."""
    return {
        "case": result.case.name,
        "device": result.device,
        "dtype": result.dtype,
        "output": result.output or None,
        "error": result.error,
        "allowance": result.allowance,
        "ok": result.fault is None,
        "fault": result.fault,
    }


def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastpref": installed("fastpref"),
        "triton": installed("triton"),
    }


def name_of_device(device: torch.device) -> str:
    """Return the name of a device, or how a CPU runs the operators and bfloat16 products."""
    if device.type == "cpu":
        operators = "C++" if cpu.native() else "PyTorch"
        return (
            f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {operators} operators, "
            f"bfloat16 products by {bf16_products()}"
        )
    return torch.get_device_module(device).get_device_name(device)

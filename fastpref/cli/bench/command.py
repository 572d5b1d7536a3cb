"""The `bench` command: its options, its errors and its exit status."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

import fastpref

INTERRUPTED = 130
SUBJECTS = ("logprobs", "linear", "losses", "trainers", "scaling")


def bench(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SUBJECT]...", help=f"What to measure: {', '.join(SUBJECTS)}.", show_default="all"),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Peers to measure, as comma-separated parts of their names, or none.", show_default="all"),
    ] = None,
    peer_file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A Python file with more peers, in the lists LOGPROBS and LINEAR."
        ),
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="smoke, default or full, or axes such as 'V=32000,50304 dtype=bf16 masked=0,0.5'.")
    ] = "default",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="the GPU if there is one")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="benchmarks/results")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds over a shape.", show_default="as many as take 4 s, at least 5"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Also measure what this code has measured here before.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only list the shapes.")] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Measure nothing; write docs/benchmarks.md, its plots and the README's tables."),
    ] = False,
) -> None:
    """Measure fastpref and the installed peers, after checking each against float64, and save the results.

    The results of a machine are one CSV file. A shape that this code has measured on this machine is not measured
    again, so the same command continues an interrupted run; Ctrl-C loses only the current shape. The exit status is 1
    if a result of fastpref is wrong. A peer that is not installed, fails or is wrong gets a row that says so.
    """
    try:
        suite = _suite()
        if report:
            import_module("benchmarks.report.documents").write(out or suite.RESULTS)
            return
        unknown = [name for name in subjects or () if name not in suite.MODULES]
        if unknown:
            raise ValueError(f"subjects are {', '.join(suite.MODULES)}, not {', '.join(unknown)}")
        device = device or _accelerator()
        wanted = [point for name in subjects or suite.having(shapes) for point in suite.points(name, device, shapes)]
        options = suite.Options(
            rounds=rounds, peers=_parts(peers), peer_file=None if peer_file is None else peer_file.resolve()
        )
    except (ValueError, OSError) as error:
        typer.echo(f"fastpref bench: {error}", err=True)
        raise typer.Exit(1) from None
    if listed:
        for point in wanted:
            typer.echo(str(point))
        return
    raise typer.Exit(_run(suite, wanted, suite.results_for(device, out or suite.RESULTS), options, fresh))


def _suite() -> Any:
    """Import the suite from the checkout that this package is in; a wheel does not have it."""
    root = Path(fastpref.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "suite.py").exists():
        raise OSError(
            f"the suite is the folder benchmarks of the repository, and there is none beside {root / 'fastpref'}: "
            "clone the repository and run pip install -e '.[bench]' there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module("benchmarks.suite")


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _parts(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(text.split(","))


def _run(suite: Any, wanted: list[Any], results: Any, options: Any, fresh: bool) -> int:
    from fastpref.cli.bench.watch import Screen

    screen = Screen(len(wanted))
    try:
        with screen:
            for _ in suite.run(wanted, results, options, screen, fresh):
                pass
    except KeyboardInterrupt:
        screen.interrupted(results.path)
        return INTERRUPTED
    return screen.summarise(results.path)

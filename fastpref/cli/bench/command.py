"""The `bench` command: its options, and what it returns to the shell."""

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
        typer.Argument(metavar="[SUBJECT]...", help=f"Of {', '.join(SUBJECTS)}.", show_default="all"),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Parts of the names of those to measure beside ours, comma-separated, or none.", show_default="all"
        ),
    ] = None,
    peer_file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A Python file with more peers: lists LOGPROBS and LINEAR of entries."
        ),
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="smoke, default or full; or axes, as in 'V=32000,50304 dtype=bf16 masked=0,0.5'.")
    ] = "default",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="the GPU if there is one")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="benchmarks/results")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds over all rows of a shape.", show_default="what takes 4 s, and 5")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what this code has measured here.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only list the shapes.")] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Measure nothing: write docs/benchmarks.md, its plots and the README's tables."),
    ] = False,
) -> None:
    """Measure ours beside the installed peers, each checked against float64 first, and keep what was measured.

    Results are one CSV a machine. A shape that this code has been measured at here is not measured again, so a run that
    was ended goes on where it was: Ctrl-C loses the shape at hand, and no other. Exits with 1 if a row of ours is
    wrong; a peer that is not installed, fails or is wrong is a row that says so.
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
    """The suite of the checkout that this package is in; no wheel has it."""
    root = Path(fastpref.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "suite.py").exists():
        raise OSError(
            f"the suite is in a checkout's folder benchmarks, and there is none beside {root / 'fastpref'}: "
            "clone the repository, and pip install -e '.[bench]' there"
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

"""The `demo` command, which says where the demo is."""

from __future__ import annotations

import typer

MOVED = (
    "fastpref demo: the demo is not part of the installed package, it is the folder examples/demo of the repository. "
    "Clone the repository and run `make demo` there; options go through ARGS, as in `make demo ARGS=--quick`."
)


def demo() -> None:
    """Say how to run the demo, which is in the repository and not in the installed package."""
    typer.echo(MOVED, err=True)
    raise typer.Exit(1)

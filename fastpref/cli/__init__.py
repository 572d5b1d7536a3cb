"""The command line: `fastpref doctor`, `check`, `bench` and `demo`."""

from __future__ import annotations

import sys

# What the extras install, which the library itself needs none of. `demo` has all of `cli`, `bench` all of both.
EXTRAS = {
    "cli": {"typer", "rich", "packaging"},
    "demo": {"transformers", "tokenizers", "matplotlib"},
    "bench": {"pytest_benchmark"},
}


def main() -> None:
    """Run the command line; a package that is not installed is one line, not a traceback."""
    try:
        _app()()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        if sys.argv[1:2] and sys.argv[1] in EXTRAS:  # a command that wants more than what was missed first
            extra = sys.argv[1]
        sys.exit(f"fastpref: {package} is not installed: pip install 'fastpref[{extra}]'")


def _app():
    import typer

    from fastpref.cli.bench.command import bench
    from fastpref.cli.check.command import check
    from fastpref.cli.demo.command import demo
    from fastpref.cli.doctor.command import doctor

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def fastpref() -> None:
        """Exact, memory-lean log-probs and preference losses."""

    app.command()(doctor)
    app.command()(check)
    app.command()(bench)
    app.command()(demo)
    return app

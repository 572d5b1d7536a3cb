"""The command line: `fastpref demo`."""

from __future__ import annotations

import sys

# What the extra `demo` installs; the library itself needs none of it.
DEMO_PACKAGES = frozenset({"typer", "rich", "transformers", "tokenizers", "matplotlib"})


def main() -> None:
    """Run the command line; a package that is not installed is one line, not a traceback."""
    try:
        _app()()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in DEMO_PACKAGES:
            raise
        sys.exit(f"fastpref: {package} is not installed: pip install 'fastpref[demo]'")


def _app():
    import typer

    from fastpref.cli.demo.command import demo

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def fastpref() -> None:
        """Exact, memory-lean log-probs and preference losses."""

    app.command()(demo)
    return app

"""The command line of the demo: `python -m examples.demo`, in the root of a checkout."""

from __future__ import annotations

import sys

NEEDED = {"typer", "rich", "transformers", "tokenizers", "matplotlib"}


def main() -> None:
    """Run the command line. If a needed package is missing, exit with one line that says how to install it."""
    try:
        app()(prog_name="python -m examples.demo")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDED:
            raise
        sys.exit(f"demo: {package} is not installed: pip install '.[demo]'")


def app():
    """Return the typer application."""
    import typer

    from examples.demo.command import demo

    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(demo)
    return application


if __name__ == "__main__":
    main()

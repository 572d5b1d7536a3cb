"""The command line: `fastpref doctor`, `check` and `bench`."""

from __future__ import annotations

import sys

# The packages that each extra installs, none of which the library itself imports. `bench` also installs those of `cli`.
EXTRAS = {"cli": {"typer", "rich", "packaging"}, "bench": {"trl", "liger_kernel", "matplotlib"}}


def main() -> None:
    """Run the command line. If a package of an extra is missing, exit with one line that says how to install it."""
    try:
        _app()()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        if sys.argv[1:2] == ["bench"]:  # it needs more than the package that was missed first
            extra = "bench"
        sys.exit(f"fastpref: {package} is not installed: pip install 'fastpref[{extra}]'")


def _app():
    import typer

    from fastpref.cli.bench.command import bench
    from fastpref.cli.check.command import check
    from fastpref.cli.demo import demo
    from fastpref.cli.doctor.command import doctor

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def fastpref() -> None:
        """Exact, memory-lean log-probs and preference losses."""

    app.command()(doctor)
    app.command()(check)
    app.command()(bench)
    # `fastpref demo` once took the demo's options: with any of them, it prints the same message.
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(demo)
    return app

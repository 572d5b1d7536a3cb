"""Run the command line as `python -m fastpref`, which also works if the package is not installed."""

from fastpref.cli import main

main()

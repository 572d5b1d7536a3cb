"""`python -m fastpref` is the command line, also where the package is not installed."""

from fastpref.cli import main

main()

"""Keep what libraries print out of the standard output of a command."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


def _flush() -> None:
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)  # what C and C++ libraries have in their buffer of the same file descriptor


@contextlib.contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Send to stderr what Python prints to stdout, and what C++ libraries, such as gloo, write to descriptor 1."""
    _flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)

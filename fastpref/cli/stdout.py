"""Keep the output of libraries out of the standard output of a command."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


def _flush() -> None:
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)  # C and C++ libraries have their own buffer of the same file descriptor


@contextlib.contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Redirect Python's stdout, and file descriptor 1, which C++ libraries such as gloo write to, to stderr."""
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

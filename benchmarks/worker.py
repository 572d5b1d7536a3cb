"""Measure points in a process of their own, so that a peer that crashes it costs a row and not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness import Options
from benchmarks.store import Rows

# A point is given up after entries have ended its process this many times.
ATTEMPTS = 4
PATIENCE = 20  # seconds that the process is given to end
Measure = Callable[[dict[str, Any], str, Options, Callable[..., None]], Rows]


class PointError(RuntimeError):
    """Raised for a point that cannot be measured at all."""


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes started inside; PyTorch's allocator reads its own when it starts."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    warnings.simplefilter("ignore")  # peers warn
    while True:
        try:
            measure, axes, device, options = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("rows", measure(axes, device, options, lambda *said: pipe.send(said))))
        except Exception:
            if not _works(device):
                os._exit(1)
            pipe.send(("failed", traceback.format_exc()))


def _works(device: str) -> bool:
    from fastpref.cli.device import works  # not at the top: it imports torch, which the parent does without

    return works(device)


class Worker:
    """Start a process when it is first needed, and another after one has ended."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.variables = variables
        self._process: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is None:
            return
        self._pipe.close()  # the process ends when nobody can send to it
        if kind is None:
            self._process.join(PATIENCE)
        self._process.terminate()
        self._process.join()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # A daemon could not start processes, as some subjects do.
        self._process = context.Process(target=_serve, args=(theirs,))
        with environment(self.variables):
            self._process.start()
        theirs.close()

    def _ending(self) -> str:
        """Clean up after the process and return how it ended."""
        process, self._process = self._process, None
        self._pipe.close()
        process.join()
        code = process.exitcode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"

    def rows(
        self, measure: Measure, axes: dict[str, Any], device: str, options: Options, say: Callable[..., None]
    ) -> Rows:
        """Return the rows of a point; an entry that ends the process gives a row that says so.

        Raises:
            PointError: something other than an entry failed, or too many entries ended the process.
        """
        for _ in range(ATTEMPTS):
            if self._process is None:
                self._start()
            on = ""
            try:
                self._pipe.send((measure, axes, device, options))
                while True:
                    kind, *content = self._pipe.recv()
                    if kind == "rows":
                        return content[0]
                    if kind == "failed":
                        print(content[0], file=sys.stderr)
                        raise PointError(content[0].strip().splitlines()[-1])
                    if kind == "on":
                        (on,) = content
                    say(kind, *content)
            except (EOFError, ConnectionError):
                ended = f"ended its process ({self._ending()})"
                if not on:
                    raise PointError(f"the process {ended}") from None
                options = replace(options, without={**options.without, on: ended})
        raise PointError(f"entries kept ending the process: {', '.join(options.without)}")

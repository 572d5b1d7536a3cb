"""Ctrl-C between two steps: what was trained so far is whole, and can be saved."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stopped(Exception):  # noqa: N818 - a request of the user's, not an error
    """Raised by `Stop.check` after a Ctrl-C."""


class Stop:
    """While entered, the first Ctrl-C only asks to stop; the second interrupts at once, as ever."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = signal.SIG_DFL

    def __enter__(self) -> Stop:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise `Stopped` if a Ctrl-C came."""
        if self.requested:
            raise Stopped

"""Let a Ctrl-C take effect between two steps, so that the models trained so far can be saved."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stopped(Exception):  # noqa: N818 - a request of the user, not an error
    """Raised by `Stop.check` after a Ctrl-C."""


class Stop:
    """A context in which the first Ctrl-C requests a stop, and the second interrupts at once, as usual."""

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
        """Raise `Stopped` if a Ctrl-C requested it."""
        if self.requested:
            raise Stopped

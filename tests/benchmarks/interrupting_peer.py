"""A peer that interrupts the run while it is measured, at the second size of the batch, as Ctrl-C would."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from torch import Tensor

from benchmarks.peers import Entry, eager


def _interrupts() -> Callable[..., Tensor]:
    def call(logits: Tensor, labels: Tensor) -> Tensor:
        if len(logits) == 2:
            os.kill(os.getppid(), signal.SIGINT)
            threading.Event().wait(600)  # the run ends this process before
        return eager(logits, labels)

    return call


LOGPROBS = [Entry("planted, interrupts", _interrupts)]

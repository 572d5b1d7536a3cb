"""Peers that raise, are wrong, hold a NaN, or take the process with them; and one that is right."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.peers import Entry, eager, linear_eager


def _raises(*_: Any) -> Any:
    raise RuntimeError("planted: no kernel image")


def _ends(*_: Any) -> Any:
    os._exit(3)


LOGPROBS = [
    Entry("planted, raises", lambda: _raises),
    Entry("planted, wrong", lambda: lambda logits, labels: eager(logits, labels) + 1),
    Entry("planted, wrong gradient", lambda: lambda z, y: eager(z, y) + (z - z.detach()).mean(-1) * 1e-3 * z.shape[-1]),
    Entry("planted, NaN", lambda: lambda logits, labels: eager(logits, labels) * float("nan")),
    Entry("planted, right", lambda: eager),
]
LINEAR = [
    Entry("planted, ends its process", lambda: _ends),
    Entry("planted, cannot be loaded", _raises),
    Entry("planted, right", lambda: linear_eager),
]

"""Judge a case of the smoke by the rule of `fastpref check`, with the float64 answer made on the same device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.smoke.worker import Answer
from fastpref.cli.device import works
from fastpref.testing.accuracy import Verdict, judge
from fastpref.testing.case import Case
from fastpref.testing.evaluate import SEED, cast, evaluate, move

LONGEST = 300  # characters of a fault


@dataclass(frozen=True, kw_only=True)
class SmokeCase:
    """A call in one dtype.

    Attributes:
        call: the function, its definition, and how its arguments are drawn.
        dtype: of the arguments.
        tier: 0 for the first case of a kernel, 1 for the options of everyday use, 2 for the rest.
        not_interpreted: why Triton's interpreter cannot run it, None if it can.
    """

    call: Case
    dtype: torch.dtype
    tier: int = 1
    not_interpreted: str | None = None

    @property
    def name(self) -> str:
        """Return the call's name and the dtype."""
        return f"{self.call.name}/{str(self.dtype).removeprefix('torch.')}"

    def launch(self, device: str) -> None:
        """Call the function and its backward once, whatever they give."""
        with self.call.within(torch.device(device)):
            leaves, constants = self._arguments()
            evaluate(self.call.function, move(leaves, device), move(constants, device), self.call.layout)

    def judge(self, device: str) -> Answer:
        """Judge every value and gradient; an exception is a fault too."""
        if self.not_interpreted and os.environ.get("TRITON_INTERPRET") == "1":
            return Answer(self.name, "SKIP", self.not_interpreted)
        try:
            verdicts = dict(self._verdicts(device))
        except Exception as error:  # whatever a kernel, a compiler or a driver raises
            return Answer(self.name, "FAIL", _line(f"{type(error).__name__}: {error}"), not works(device))
        for tensor, verdict in verdicts.items():
            if verdict.fault is not None:
                return Answer(self.name, "FAIL", _line(f"{tensor}: {verdict.fault}"), not works(device))
        worst = max(verdicts.values(), key=_share, default=Verdict())
        return Answer(self.name, "PASS", f"error={worst.error or 0:.1e} allowed={worst.allowance or 0:.1e}")

    def _arguments(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        leaves, constants = self.call.draw(torch.Generator().manual_seed(SEED))
        return cast(leaves, self.dtype), cast(constants, self.dtype)

    def _verdicts(self, device: str) -> Iterator[tuple[str, Verdict]]:
        call = self.call
        with call.within(torch.device(device)):
            leaves, constants = (move(named, device) for named in self._arguments())
            ours = evaluate(call.function, leaves, constants, call.layout)
            # The interpreter runs one program after another, always in the same order.
            again = ours if device == "cpu" else evaluate(call.function, leaves, constants, call.layout)
            eager = evaluate(call.definition, leaves, constants, call.layout)
            exact = cast(leaves, torch.float64), cast(constants, torch.float64)
            truth, summed = evaluate(call.definition, *exact, call.layout), call.summed(*exact)
        if ours.keys() != truth.keys():
            yield "results", Verdict(fault=f"{', '.join(ours)}, wanted {', '.join(truth)}")
            return
        slack = call.slack if self.dtype == torch.float64 else 1.0
        for name, value in ours.items():
            verdict = judge(value, eager[name], truth[name], summed=summed.get(name, 0.0), slack=slack)
            if verdict.fault is None and not torch.allclose(value, again[name], rtol=0, atol=0, equal_nan=True):
                verdict = verdict._replace(fault="two runs differ")
            yield name, verdict


def _share(verdict: Verdict) -> float:
    """Return the error as a share of what is allowed."""
    return verdict.error / verdict.allowance if verdict.error and verdict.allowance else 0.0


def _line(text: str) -> str:
    """Return the first line, cut where it is long."""
    first = text.strip().split("\n")[0]
    return first if len(first) <= LONGEST else first[:LONGEST] + "..."

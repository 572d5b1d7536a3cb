"""Runs cases: ours and eager on a device in a dtype, the truth on the CPU in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from fastpref.cli.check.allowance import judge
from fastpref.cli.check.case import Case
from fastpref.cli.check.evaluate import GRADIENT, SEED, cast, evaluate, move
from fastpref.cli.check.linear_cases import linear_cases
from fastpref.cli.check.logprobs_cases import logprobs_cases
from fastpref.cli.check.loss_cases import loss_cases
from fastpref.cli.check.product_cases import product_cases
from fastpref_kernels.precision import full_float32


@dataclass(frozen=True, kw_only=True)
class Result:
    """One tensor that a call gave, judged.

    Attributes:
        case: the case.
        device: where it ran.
        dtype: of the arguments.
        output: the tensor's name, a gradient's with ∂ before it; of a call that raised, empty.
        error: the largest difference from the truth, None where no number was compared.
        allowance: what it may be.
        fault: what is wrong, or None.
    """

    case: Case
    device: str
    dtype: str
    output: str
    error: float | None = None
    allowance: float | None = None
    fault: str | None = None

    @property
    def is_gradient(self) -> bool:
        """Whether it is a gradient, not a value."""
        return self.output.startswith(GRADIENT)

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        return self.error / self.allowance if self.error is not None and self.allowance else 0.0


def chosen_cases(pattern: str | None) -> list[Case]:
    """All cases, or those whose name has the pattern in it, or matches it as a glob."""
    every = (*product_cases(), *logprobs_cases(), *linear_cases(), *loss_cases())
    return [case for case in every if pattern is None or pattern in case.name or fnmatch(case.name, pattern)]


def run(case: Case, device: torch.device, dtype: torch.dtype) -> list[Result]:
    """Judge every value and gradient of a case; that it raises is a result too."""

    def result(output: str, **found: Any) -> Result:
        return Result(case=case, device=str(device), dtype=name_of(dtype), output=output, **found)

    try:
        with case.within(device):
            # The environment may have lowered the precision of eager's products, and so what ours are measured by.
            with _one_thread(), full_float32():
                leaves, constants = case.draw(torch.Generator().manual_seed(SEED))
                leaves, constants = cast(leaves, dtype), cast(constants, dtype)
                exact = cast(leaves, torch.float64), cast(constants, torch.float64)
                truth, summed = evaluate(case.definition, *exact, case.layout), case.summed(*exact)
                here = move(leaves, device), move(constants, device)
                eager = evaluate(case.definition, *here, case.layout)
            ours, again = (evaluate(case.function, *here, case.layout) for _ in range(2))
        if ours.keys() != truth.keys():
            return [result("", fault=f"gives {', '.join(ours)}, wanted {', '.join(truth)}")]
        results, slack = [], case.slack if dtype == torch.float64 else 1.0
        with _one_thread():
            for name, value in ours.items():
                verdict = judge(value, eager[name], truth[name], summed=summed.get(name, 0.0), slack=slack)
                fault = verdict.fault
                if fault is None and not torch.allclose(value, again[name], rtol=0, atol=0, equal_nan=True):
                    fault = "two runs differ"
                results.append(result(name, error=verdict.error, allowance=verdict.allowance, fault=fault))
    except Exception as error:  # whatever a kernel, a compiler or a driver raises is what is asked for
        return [result("", fault=f"{type(error).__name__}: {error}")]
    return results


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For what is not judged: on a busy machine, threads that wait for each other take longer than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def name_of(dtype: torch.dtype) -> str:
    """Its name without the module's."""
    return str(dtype).removeprefix("torch.")

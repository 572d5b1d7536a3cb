"""Run cases: fastpref and eager PyTorch on a device in a dtype, and the truth on the CPU in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from fastpref.testing.accuracy import judge
from fastpref.testing.case import Case
from fastpref.testing.evaluate import GRADIENT, SEED, cast, evaluate, move
from fastpref.testing.linear_cases import linear_cases
from fastpref.testing.logprobs_cases import logprobs_cases
from fastpref.testing.loss_cases import loss_cases
from fastpref.testing.product_cases import product_cases
from fastpref_kernels.precision import full_float32


@dataclass(frozen=True, kw_only=True)
class Result:
    """The verdict on one tensor that a call returned.

    Attributes:
        case: the case.
        device: the device of the call.
        dtype: the dtype of the arguments.
        output: the name of the tensor, with "∂" in front for a gradient; empty if the call raised.
        error: the largest difference from the truth, or None if no numbers were compared.
        allowance: the largest error that the rule allows.
        fault: a message about what is wrong, or None.
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
        """Return whether the tensor is a gradient."""
        return self.output.startswith(GRADIENT)

    @property
    def share(self) -> float:
        """Return the error as a share of the allowance."""
        return self.error / self.allowance if self.error is not None and self.allowance else 0.0


def chosen_cases(pattern: str | None) -> list[Case]:
    """Return all cases, or those whose name contains the pattern or matches it as a glob."""
    every = (*product_cases(), *logprobs_cases(), *linear_cases(), *loss_cases())
    return [case for case in every if pattern is None or pattern in case.name or fnmatch(case.name, pattern)]


def run(case: Case, device: torch.device, dtype: torch.dtype) -> list[Result]:
    """Judge every value and gradient of a case; a call that raises gives one result with the error as its fault."""

    def result(output: str, **found: Any) -> Result:
        return Result(case=case, device=str(device), dtype=name_of(dtype), output=output, **found)

    try:
        with case.within(device):
            # The environment may lower the precision of float32 products, which would raise the allowance.
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
    except Exception as error:  # any error of a kernel, a compiler or a driver is a result
        return [result("", fault=f"{type(error).__name__}: {error}")]
    return results


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, which on a busy machine is faster than threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the module."""
    return str(dtype).removeprefix("torch.")

"""Log-probs from logits on a CPU, in C++ where it is built."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpref_kernels import cpu
from fastpref_kernels.eager import logprobs as eager


def logprobs(*arguments: Any) -> tuple[Tensor, ...]:
    """Run `fastpref::logprobs`."""
    operators = cpu.native()
    if operators is None:
        return eager.logprobs(*arguments)
    *fixed, statistics = operators.logprobs(*arguments)
    return (*fixed, *statistics)


def logprobs_backward(*arguments: Any) -> None:
    """Write the gradient of logits to the first argument, which may be the logits themselves."""
    (cpu.native() or eager).logprobs_backward(*arguments)

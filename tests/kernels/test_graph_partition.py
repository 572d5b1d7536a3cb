"""The operators that wait for the host are those that the compiler is told to run between CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref_kernels import linear, ops


class HostReads(TorchDispatchMode):
    """Counts the calls that make the host wait for values, which on a GPU is a synchronisation."""

    WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.number += function.overloadpacket in self.WAITING or by_mask
        return function(*args, **(kwargs or {}))


def test_operators_that_wait_for_the_host_are_run_between_cuda_graphs() -> None:
    """Where this PyTorch can be told so, the compiler leaves them out of the graphs that it captures."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this PyTorch has no such tag")
    # What runs on every device; the rest are kernels of their own on a GPU, and tests/gpu looks for waits there.
    backend = linear.library_backend(linear.fold, linear.fold_backward)
    hidden, weight, labels = torch.randn(2, 4, 6), torch.randn(9, 6), torch.randint(9, (2, 4))
    scoring, chunking, shard = (-100, True, 1.0, 1.0, None), (None, None, None), torch.tensor([0, 9])
    given = (hidden, weight, None, labels, None, None, *scoring, 0, *chunking)
    logps, norm, shares, *_ = linear.linear_logprobs(backend, *given)
    sums, masses = linear.linear_fold(backend, *given)
    back = (logps, None, hidden, weight, None, labels, None, norm, None, shares)
    totals, dtypes = (torch.zeros_like(hidden), torch.zeros_like(weight), None), (torch.float32,) * 3
    calls: dict[str, Callable[[], Any]] = {
        "linear_logprobs": lambda: linear.linear_logprobs(backend, *given),
        "linear_fold": lambda: linear.linear_fold(backend, *given),
        "linear_finalize": lambda: linear.linear_finalize(
            backend, hidden, labels, None, shard, sums, sums, masses, None, *scoring, 0, None, None
        ),
        "shard_labels": lambda: linear.shard_labels(labels, None, shard, 9, -100, True, True),
        "linear_logprobs_backward": lambda: linear.linear_logprobs_backward(
            backend, *back, [True, True, False], *dtypes, *scoring, *chunking
        ),
        "linear_logprobs_backward_": lambda: linear.linear_logprobs_backward_(
            backend, *back, *totals, False, *scoring, *chunking
        ),
        "scaled_gradient": lambda: linear.scaled_gradient(backend, hidden, torch.tensor(2.0), torch.bfloat16),
    }
    waiting = set()
    for name, call in calls.items():
        with HostReads() as reads:
            call()
        if reads.number:
            waiting.add(name)
    schemas = {name.partition("(")[0] for name in ops._SCHEMAS}
    assert calls.keys() == {name for name in schemas if name.startswith(("linear", "shard", "scaled"))}
    tagged = {name for name in schemas if tag in getattr(torch.ops.fastpref, name).default.tags}
    assert tagged == waiting

"""A step from hidden states waits for the GPU once at the most, and never where it is told how many rows are scored.

These tests need no GPU. `test_capture.py` holds the same of steps that are told the rows of each sequence, of log-probs
from logits, and of losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastpref
from tests.gpu_stand_in import on_gpu
from tests.host_steps import CHUNKED, LINEAR, LOGITS, SCORED, SHARDED, SHARDED_LOGITS, Batch, both
from tests.host_waits import Trace, host_trace

pytest.importorskip("triton")
STEPS = LINEAR | CHUNKED


def assert_waits(traces: tuple[Trace, Trace], at_most: int) -> None:
    forward, backward = (trace.waits for trace in traces)
    assert len(forward) <= at_most, "\n".join(["the forward waits:", *forward])
    assert not backward, "\n".join(["the backward waits:", *backward])


@pytest.mark.parametrize("name", STEPS)
def test_a_step_counts_its_rows_once(name: str) -> None:
    batch = Batch.of(0)
    assert_waits(both(lambda: STEPS[name](batch)), at_most=1)


@pytest.mark.parametrize("name", LINEAR)
def test_a_step_that_is_told_how_many_rows_waits_for_nothing(name: str) -> None:
    batch = Batch.of(0)
    assert_waits(both(lambda: STEPS[name](batch, scored_rows=sum(SCORED))), at_most=0)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_step_counts_its_rows_once(name: str, group: Any) -> None:
    batch = Batch.of(0)
    assert_waits(both(lambda: STEPS[name](batch, process_group=group)), at_most=1)


@pytest.mark.parametrize("name", SHARDED_LOGITS)
def test_sharded_logits_count_their_rows_once(name: str, group: Any) -> None:
    batch = Batch.of(0)
    assert_waits(both(lambda: LOGITS[name](batch, process_group=group)), at_most=1)


# Operators that launch nothing: they allocate memory, or look at what is there in another shape.
FREE = frozenset((
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "flatten", "is_same_size", "narrow", "new_empty", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
))  # fmt: skip
LARGE: dict[str, tuple[Callable[..., Any], int]] = {
    "save": (functools.partial(fastpref.linear_token_logprobs, mode="save"), 210),
    "recompute": (functools.partial(fastpref.linear_token_logprobs, mode="recompute"), 348),
    "recompute, filtered": (functools.partial(fastpref.linear_token_logprobs, mode="recompute", filter_eps=1e-3), 349),
    "DPO": (functools.partial(fastpref.linear_dpo_loss, reference_free=True), 225),
    "DPO in two chunks": (functools.partial(fastpref.linear_dpo_loss, reference_free=True, chunk_rows=13), 489),
}


@pytest.mark.parametrize("name", LARGE)
def test_few_operators_and_launches_of_a_large_vocabulary(name: str) -> None:
    """32 tiles of columns, four sequences: docs/kernels/index.md gives these numbers."""
    function, at_most = LARGE[name]
    hidden, weight = torch.randn(4, 9, 8).bfloat16(), torch.randn(128256, 8).bfloat16()
    labels = torch.randint(128256, (4, 9))
    labels[:, :3] = -100
    with host_trace() as trace:
        given = on_gpu(hidden.requires_grad_()), on_gpu(weight.requires_grad_()), on_gpu(labels)
        trace.operations.clear()
        found = function(*given)
        (found.sum() if isinstance(found, torch.Tensor) else found.loss).backward()
    launched = [step.name for step in trace.operations if step.name.removeprefix("aten.").split(".")[0] not in FREE]
    assert len(launched) <= at_most

"""A CUDA graph can hold a step that is told how many rows are scored, and is right for the next batch.

These tests need no GPU. A step that uses another stream, or waits in no operator, asks for a driver and so fails.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import pytest
import torch

from fastpref.losses import RLHF, TABLE, Entry
from tests.gpu_stand_in import on_gpu
from tests.host_steps import (
    CHUNKED,
    LINEAR,
    LOGITS,
    SCORED,
    SHARDED,
    Batch,
    both,
    loss_step,
)

pytest.importorskip("triton")
STEPS = LINEAR | CHUNKED


def assert_captured(step_of: Callable[[int], Callable[[], Any]]) -> None:
    """Check that a graph can hold a step, and that batches that differ by values make it of the same operations."""
    first, other = ([trace.operations for trace in both(step_of(seed))] for seed in (0, 1))
    operations = first[0] + first[1]
    refused = [f"{step.line} {step.name}: {step.uncapturable}" for step in operations if step.uncapturable]
    assert not refused, "\n".join(["a CUDA graph cannot hold:", *refused])
    for ours, theirs in zip_longest(operations, other[0] + other[1]):
        assert ours is not None, f"only some values take {theirs}"
        assert theirs is not None, f"only some values take {ours}"
        assert (ours.name, ours.given) == (theirs.name, theirs.given), f"{ours.line} and {theirs.line} depend on values"


def draws(x: Any, seed: int) -> Any:
    return x + torch.rand_like(x)


def copies(x: Any, seed: int) -> Any:
    return x + torch.ones(2).pin_memory().to(x.device, non_blocking=True)


def waits(x: Any, seed: int) -> Any:
    return x[x > 0]


def passes_a_value(x: Any, seed: int) -> Any:
    return x * seed


def takes_a_branch(x: Any, seed: int) -> Any:
    return x * 2 if seed else x


def has_another_shape(x: Any, seed: int) -> Any:
    return torch.stack([x] * (seed + 1))


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (draws, "random numbers are drawn"),
        (copies, "copied from the host once"),
        (waits, "the number of True in a mask is read"),
        (passes_a_value, "depend on values"),
        (takes_a_branch, "values"),
        (has_another_shape, "values"),
    ],
)
def test_what_no_graph_may_hold_is_found(step: Callable[[Any, int], Any], problem: str) -> None:
    x = on_gpu(torch.tensor([1.0, -1.0], requires_grad=True))
    with pytest.raises(AssertionError, match=problem):
        assert_captured(lambda seed: lambda: step(x, seed).sum())


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_told_its_rows(name: str) -> None:
    def step_of(seed: int) -> Callable[[], Any]:
        batch = Batch.of(seed)
        return lambda: STEPS[name](batch, scored_rows=list(SCORED))

    assert_captured(step_of)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_step_that_is_told_its_rows(name: str, group: Any) -> None:
    def step_of(seed: int) -> Callable[[], Any]:
        batch = Batch.of(seed)
        return lambda: STEPS[name](batch, process_group=group, scored_rows=list(SCORED))

    assert_captured(step_of)


@pytest.mark.parametrize("name", LOGITS)
def test_logits(name: str) -> None:
    def step_of(seed: int) -> Callable[[], Any]:
        batch = Batch.of(seed)
        return lambda: LOGITS[name](batch)

    assert_captured(step_of)


@pytest.mark.parametrize("entry", [*TABLE, *RLHF], ids=lambda entry: entry.name)
def test_a_loss(entry: Entry) -> None:
    assert_captured(lambda seed: loss_step(entry, seed))

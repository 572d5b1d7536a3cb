"""A step from hidden states waits for the GPU once at the most, and never where it is told how many rows are scored.

These tests need no GPU. `test_capture.py` holds the same of steps that are told the rows of each sequence, of log-probs
from logits, and of losses.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.host_steps import CHUNKED, LINEAR, LOGITS, SCORED, SHARDED, SHARDED_LOGITS, Batch, both
from tests.host_waits import Trace

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

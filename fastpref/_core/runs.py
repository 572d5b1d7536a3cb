"""Divide the groups of a batch into runs whose exponentials are kept together."""

from __future__ import annotations

from typing import NamedTuple

from fastpref._core.autograd import has_values
from fastpref._core.resolve import LinearBatch


class Run(NamedTuple):
    """Groups whose exponentials are kept together: the groups [begin, end), with their number of scored rows.

    `rows` is None in a graph that does not know it.
    """

    begin: int
    end: int
    rows: int | None


def _runs(rows: list[int], limit: int) -> list[Run]:
    """Return the fewest runs of groups that have at most `limit` rows each. No single group may have more."""
    runs: list[Run] = []
    begin, held = 0, 0
    for group, count in enumerate(rows):
        if held + count > limit:
            runs.append(Run(begin, group, held))
            begin, held = group, 0
        held += count
    return [*runs, Run(begin, len(rows), held)] if rows else []


def _even_runs(rows: list[int], limit: int) -> list[Run]:
    """Return as few runs as `_runs`, with the least limit that allows it, so that the last is no small remainder."""
    runs = _runs(rows, limit)
    least = max(rows, default=0)
    while least < limit:
        middle = (least + limit) // 2
        if len(_runs(rows, middle)) == len(runs):
            limit = middle
        else:
            least = middle + 1
    return _runs(rows, limit)


class Plan(NamedTuple):
    """Runs of groups, and the number of rows to allocate."""

    runs: list[Run]
    room: int


def make_plan(batch: LinearBatch, group_size: int, limit: int) -> Plan | None:
    """Return runs of groups of at most `limit` scored rows each; None if a single group has more."""
    known, scored, cu_seqlens, sequences = batch.rows, batch.scored, batch.cu_seqlens, batch.sequences()
    groups = sequences // group_size
    if known.of_sequences is None and not has_values(scored):
        if groups and known.total is not None and known.total <= limit:
            return Plan([Run(0, groups, known.total)], known.total)
        # Only shapes are known, not values: every position counts, and packed sequences cannot be told apart.
        if cu_seqlens is not None:
            return Plan([Run(0, groups, None)], scored.numel()) if scored.numel() <= limit else None
        rows = group_size * scored.shape[1]
        if rows > limit:
            return None
        runs = _runs([rows] * groups, limit)
        room = max([0, *((run.end - run.begin) * rows for run in runs)])
        return Plan([Run(run.begin, run.end, None) for run in runs], room)
    if groups and known.total is not None and known.total <= limit:
        return Plan([Run(0, groups, known.total)], known.total)
    of_sequences = known.by_sequence(scored, cu_seqlens, sequences)
    of_groups = [sum(of_sequences[group::groups]) for group in range(groups)]
    if max(of_groups, default=0) > limit:
        return None
    runs = _even_runs(of_groups, limit)
    return Plan(runs, max((run.rows or 0 for run in runs), default=0))

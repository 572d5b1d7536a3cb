"""What every benchmark shares: interleaved rounds, a process for every allocator, peaks of memory, tables."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from fastpref.cli.demo import memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOCATORS = {"default": {}, "THP": {"THP_MEM_ALLOC_ENABLE": "1"}}
MIB = 2**20

Rows = list[dict[str, Any]]
# Heading, field, how it is written.
Columns = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Case:
    """What is timed, and what is done before every round that is not."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None

    def seconds(self, cuda: bool) -> float:
        """One timing."""
        if not cuda:
            start = time.perf_counter()
            self.run()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # launches queue up behind it, so that the device does not wait for Python
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def interleaved(cases: dict[str, Case], rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of every round of every case, after two rounds that are not counted.

    Every round is in an order of its own: what a case leaves behind in the allocator and the operating system is the
    next one's to pay, and must not always fall to the same.
    """
    names = list(cases)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-2, rounds):
        # All of them now and not each before its own timing, which would then find its logits in the cache.
        for name in names:
            cases[name].before()
        for name in order.sample(names, len(names)):
            taken = cases[name].seconds(cuda)
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that a call on the CPU has at most beyond what is resident before it; meant for a process of its own."""
    peak = memory.peak_bytes(run, torch.device("cpu"))
    if peak is None:
        raise OSError("/proc/self/clear_refs cannot be written: nothing here counts a peak of memory")
    return peak


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables of processes started within it: PyTorch's allocator reads its own once, at the start."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def child(variables: dict[str, str]) -> Iterator[ProcessPoolExecutor]:
    """A fresh process under other environment variables."""
    with environment(variables), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def resumed(path: Path, runs: list[Any], measure: Callable[[Any], Rows]) -> Rows:
    """The rows of all runs, each kept in `path`.partial.json as soon as it is measured, until all are.

    What an interrupted call on the same commit has measured is not measured again.
    """
    partial, commit = path.with_suffix(".partial.json"), peers.provenance()["commit"]
    held = json.loads(partial.read_text()) if partial.exists() else {}
    found: dict[str, Rows] = held["rows"] if held.get("commit") == commit else {}
    for run in runs:
        if str(run) not in found:
            found[str(run)] = measure(run)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"commit": commit, "rows": found}))
    partial.unlink(missing_ok=True)
    return [row for run in runs for row in found[str(run)]]


def cells(rows: Rows, columns: Columns) -> tuple[list[str], list[list[str]]]:
    """Headings and text of the columns that any measured row fills."""
    rows = [row for row in rows if "problem" not in row]
    used = [column for column in columns if any(column[1] in row for row in rows)]
    lines = [[form.format(row[field]) if field in row else "" for _, field, form in used] for row in rows]
    return [heading for heading, _, _ in used], lines


def write(rows: Rows, columns: Columns, notes: list[str], path: Path, title: str) -> None:
    """`path`.csv, one row a measurement, and `path`.md, the table with what it depends on."""
    # Before a file is written, which would make a clean checkout a changed one.
    constant = {key: value for key, value in peers.provenance().items() if key != "THP_MEM_ALLOC_ENABLE"}
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(field for row in rows for field in row))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    headings, lines = cells(rows, columns)
    text = [title, "", "| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    text += ["", *(f"- {line}" for line in notes), ""]
    text += ["Measured with " + ", ".join(f"{key} {value}" for key, value in constant.items()) + "."]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def show(rows: Rows, columns: Columns, notes: list[str], title: str, console: Console) -> None:
    """The same table on a terminal."""
    headings, lines = cells(rows, columns)
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table, *notes, sep="\n")

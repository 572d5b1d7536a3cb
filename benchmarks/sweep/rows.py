"""Measure the rows of the sweep, append each to a CSV as soon as it is known, and sum them up."""

from __future__ import annotations

import contextlib
import csv
import gc
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.sweep import ceilings, timing
from benchmarks.sweep.case import Case

KEY = ("group", "kernel", "dtype", "R", "V", "H", "config")
RESOURCES = ("registers", "shared", "spills", "programs")
FIGURES = ("us", "us_q1", "us_q3", "gbytes_per_s", "of_copy", "tflop_per_s", "of_product", "error")
PROFILE = ("launches", "waits", "busy_us", "idle_us")
COLUMNS = ("device", "code", *KEY, "current", *RESOURCES, *FIGURES, *PROFILE, "status")
BEST = 3
Row = dict[str, Any]


class Table:
    """The rows of one file."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device, self.code = path, machine.machine(device), machine.package_version("fastpref")
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                # A line without a status was cut off when its process was killed.
                self.rows = [row for row in csv.DictReader(file) if row.get("status")]
        self._write([dict(zip(COLUMNS, COLUMNS, strict=True)), *self.rows], "w")

    def _write(self, rows: list[Row], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([row[name] for name in COLUMNS] for row in rows)

    def holds(self, case: Case) -> bool:
        """Return whether this code has measured a case on this device."""
        wanted = ("ok", self.device, self.code, *case.key)
        return any(tuple(row[name] for name in ("status", "device", "code", *KEY)) == wanted for row in self.rows)

    def add(self, row: Row) -> None:
        """Append a row, in the file too."""
        text = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        text = {name: text.get(name, "") for name in COLUMNS}
        self.rows.append(text)
        self._write([text], "a")

    def ceiling(self, kernel: str, column: str) -> float:
        """Return the speed of the device itself, or NaN if it was not measured."""
        found = [row[column] for row in self.rows if row["kernel"] == kernel and row["device"] == self.device]
        return float(found[-1] or "nan") if found else math.nan


def measure(case: Case, device: str, table: Table) -> Row:
    """Return a case's row; its status is "ok", or what is wrong."""
    row: Row = {
        "device": table.device,
        "code": table.code,
        **dict(zip(KEY, case.key, strict=True)),
        "current": int(case.current),
    }
    try:
        with case.within():
            _measure(case, device, table, row)
        row["status"] = "ok"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        row["status"] = f"{type(error).__name__}: {lines[0]}"[:200]
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(Exception):  # after an error that stays with the device
            torch.cuda.empty_cache()
    return row


def _measure(case: Case, device: str, table: Table, row: Row) -> None:
    trial = case.make(device, case.R)
    with timing.recorded() as kernels:
        trial.run()
    row["error"] = trial.error()
    if math.isnan(row["error"]):
        raise ValueError("an output is NaN or was not written")
    if row["error"] > trial.allowed:
        raise ValueError(f"off by {row['error']:.1e}, where {trial.allowed:.1e} is allowed")
    row["us_q1"], row["us"], row["us_q3"] = timing.quartiles(timing.microseconds(trial.run, device, trial.whole))
    if device == "cuda" and kernels:
        # Of several kernels, report the one with the most registers.
        row |= max((timing.resources(kernel) for kernel in kernels), key=lambda found: found["registers"])
    if device == "cuda" and trial.whole and case.profiled:
        with contextlib.suppress(RuntimeError):  # these columns are optional
            row |= timing.profiled(trial.run)
    if trial.gbytes:
        row["gbytes_per_s"] = trial.gbytes / row["us"] * 1e6
        row["of_copy"] = row["gbytes_per_s"] / (table.ceiling(ceilings.COPY, "gbytes_per_s"))
    if trial.tflop:
        row["tflop_per_s"] = trial.tflop / row["us"] * 1e6
        row["of_product"] = row["tflop_per_s"] / (table.ceiling(ceilings.PRODUCT, "tflop_per_s"))


def said(row: Row) -> str:
    """Return the figures of a row in one line."""
    if "us" not in row or row["us"] == "":
        return row["status"]
    text = f"{float(row['us']):.1f} us"
    for name, unit in (("of_copy", "copy"), ("of_product", "product")):
        if row.get(name) and not math.isnan(float(row[name])):
            text += f", {float(row[name]):.0%} of {unit}"
    for name in ("error", "registers", "programs", "launches", "waits", "idle_us"):
        if row.get(name) not in (None, ""):
            text += f", {name.removesuffix('_us')} {float(row[name]):.3g}"
    return text if row["status"] == "ok" else f"{text}; {row['status']}"


def summary(rows: list[Row]) -> str:
    """Return the best variants of every kernel and shape beside the current setting, then what failed."""
    lines = []

    def shape(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in KEY[:-1])

    for key, found in groupby(sorted((row for row in rows if row["status"] == "ok"), key=shape), shape):
        variants = sorted(found, key=lambda row: float(row["us"]))
        shown = [*variants[:BEST], *(row for row in variants[BEST:] if row["current"] == "1")]
        figures = [f"{row['config']}{' (now)' * (row['current'] == '1')} {said(row)}".strip() for row in shown]
        lines.append(f"{' '.join(part for part in key if part not in ('', '0'))}: {' | '.join(figures)}")
    lines += [
        f"FAILED {row['group']} {row['kernel']} {row['dtype']} {row['R']}x{row['V']} {row['config']}: {row['status']}"
        for row in rows
        if row["status"] != "ok"
    ]
    return "\n".join(lines)

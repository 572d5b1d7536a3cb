"""Measure a vocabulary on one rank and split over two: time, memory and bytes sent by each rank.

`fastpref bench scaling` runs this subject. Ranks are processes of one thread on this machine. Bytes on the wire are
read from the counter of its loopback device, and include the headers and acknowledgements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

import fastpref
from benchmarks import harness, machine, peers
from benchmarks.harness import DTYPES, Options
from benchmarks.peers import Entry
from benchmarks.store import Row, Rows

BASE = {
    "dtype": "fp32",
    "B": 4,
    "T": 128,
    "V": 32001,
    "H": 512,
    "masked": 0.5,
}  # an odd V, so that the shards differ in size
AXES = tuple(BASE)
ROUNDS = 5
RANKS = (1, 2)
FORMS = ("logits", "save", "recompute", "linear_dpo_loss")
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


class Problem:
    """The inputs of a step on this rank: its columns of the vocabulary, and what all ranks share."""

    def __init__(self, form: str, axes: Row) -> None:
        B, T, V, H = (axes[name] for name in "BTVH")
        dtype, self.width = DTYPES[axes["dtype"]], H
        ranks, rank = dist.get_world_size(), dist.get_rank()
        generator = torch.Generator().manual_seed(0)
        size = -(-V // ranks)
        self.columns = min(size, V - rank * size)
        self.hidden = torch.randn(B, T, H, generator=generator).to(dtype).requires_grad_()
        self.labels = torch.randint(V, (B, T), generator=generator)
        self.labels[:, 1 : int(T * axes["masked"]) + 1] = -100
        self.weight = (torch.randn(self.columns, H, generator=generator) / 16).to(dtype).requires_grad_()
        self.scored = int((self.labels[:, 1:] != -100).sum())
        self.form = form
        self.group: dict[str, Any] = {"process_group": dist.group.WORLD} if ranks > 1 else {}
        if form == "logits":
            with torch.no_grad():
                self.leaf = (self.hidden @ self.weight.t()).requires_grad_()
            del self.hidden, self.weight
            self.inputs = [self.leaf]
        else:
            self.inputs = [self.hidden, self.weight]

    def step(self) -> None:
        """Run a forward and backward."""
        if self.form == "logits":
            loss = fastpref.token_logprobs(self.leaf, self.labels, **self.group).sum()
        elif self.form == "linear_dpo_loss":
            references = torch.zeros(len(self.labels)).chunk(2)
            loss = fastpref.linear_dpo_loss(self.hidden, self.weight, self.labels, *references, **self.group).loss
        else:
            loss = fastpref.linear_token_logprobs(
                self.hidden, self.weight, self.labels, mode=self.form, **self.group
            ).sum()
        loss.backward()
        for leaf in self.inputs:
            leaf.grad = None

    def payload(self) -> int:
        """Return the bytes that this rank gives to all-reduces in a step, by the formulas of docs/scaling.md."""
        if not self.group:
            return 0
        if self.form == "logits":
            return 24 * self.labels[:, 1:].numel()
        return 24 * self.scored + 4 * self.scored * self.width

    def gradients(self) -> int:
        """Return the bytes of the gradients that a step makes."""
        return sum(leaf.nbytes for leaf in self.inputs)


def counted(run: Callable[[], object]) -> int:
    """Return the bytes that this rank gives to all-reduces in a call."""
    found, own = 0, dist.all_reduce

    def all_reduce(values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal found
        found += values.nbytes
        return own(values, *args, **kwargs)

    dist.all_reduce = all_reduce  # type: ignore[assignment]
    try:
        run()
    finally:
        dist.all_reduce = own
    return found


def work(out: str, given: str, rounds: str) -> None:
    """Measure every form on this rank; rank 0 writes the rows to a file."""
    axes: Row = json.loads(given)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [_measured(form, axes, int(rounds)) for form in FORMS]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _measured(form: str, axes: Row, rounds: int) -> Row:
    """Return the row of a form, the same on every rank."""
    problem = Problem(form, axes)
    problem.step()
    payload = counted(problem.step)
    dist.barrier()
    peak = harness.peak_bytes(problem.step, "cpu")
    dist.barrier()
    wire, seconds = int(LOOPBACK.read_text()), []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        problem.step()
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    wire = int(LOOPBACK.read_text()) - wire
    own = {"peak": (peak or 0) - problem.gradients(), "seconds": seconds}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {
        "name": form,
        "ranks": len(ranks),
        "scored": problem.scored,
        # A step is as slow as its slowest rank.
        **harness.statistics_of([max(times) for times in zip(*(r["seconds"] for r in ranks), strict=True)]),
        "payload_kib": payload / 2**10,
        "expected_kib": problem.payload() / 2**10,
        # A ring of two sends the payload of each rank once, and the loopback device counts both ranks.
        "wire_kib": wire / rounds / len(ranks) / 2**10,
        "peak_mib": max(r["peak"] for r in ranks) / harness.MIB,
    }


def entries(options: Options, axes: dict[str, Any]) -> list[Entry]:
    """Return the entries of fastpref; this subject has no peers."""
    return [peers.process(form, "fastpref") for form in FORMS]


def measure(axes: dict[str, Any], device: str, options: Options, say: Callable[..., None]) -> Rows:
    """Measure one dtype on one rank and on two; a payload that differs from its formula fails the row."""
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            say("on", f"{ranks} ranks")
            found = Path(folder) / f"{ranks}.json"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            given = [str(found), json.dumps(axes), str(options.rounds or ROUNDS)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *launch, __file__, *given], env=environment, check=True)
            rows += json.loads(found.read_text())
    for row in rows:
        row |= {"pass": "forward + backward", "package": "fastpref", "version": machine.package_version("fastpref")}
        row["gate"] = "within"
        if row["payload_kib"] != row["expected_kib"]:
            row |= {
                "gate": "failed",
                "problem": f"gives {row['payload_kib']} KiB to all-reduces, expected {row['expected_kib']}",
            }
    return rows


def points(preset: str, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (allocator, axes) of a preset."""
    if device == "cpu":
        for dtype in DTYPES if preset != "smoke" else ("fp32",):
            yield "default", {**BASE, "dtype": dtype, **({"T": 16, "V": 1031, "H": 32} if preset == "smoke" else {})}


if __name__ == "__main__":
    work(*sys.argv[1:])

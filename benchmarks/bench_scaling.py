"""A vocabulary over one rank and over two: time, bytes on the wire and memory a rank, beside what they should be.

    python benchmarks/bench_scaling.py [--out FOLDER] [--rounds N]

Ranks are processes of one thread on this machine, and the wire is its loopback device, whose counter is read: what
gloo adds to its payload, and the acknowledgements, are in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

import fastpref
from benchmarks import harness
from benchmarks.harness import DTYPES

B, T, H, V = 4, 256, 512, 65537  # half of the tokens scored; no even number of columns
RANKS = (1, 2)
FORMS = ("logits", "save", "recompute", "linear_dpo_loss")
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


class Problem:
    """A step of this rank: its columns of the vocabulary, and what every rank has."""

    def __init__(self, form: str, dtype: torch.dtype) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        generator = torch.Generator().manual_seed(0)
        size = -(-V // ranks)
        self.columns = min(size, V - rank * size)
        self.hidden = torch.randn(B, T, H, generator=generator).to(dtype).requires_grad_()
        self.labels = torch.randint(V, (B, T), generator=generator)
        self.labels[:, 1 : T // 2 + 1] = -100
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
        """Forward and backward."""
        if self.form == "logits":
            loss = fastpref.token_logprobs(self.leaf, self.labels, **self.group).sum()
        elif self.form == "linear_dpo_loss":
            loss = fastpref.linear_dpo_loss(
                self.hidden, self.weight, self.labels, *torch.zeros(B).chunk(2), **self.group
            ).loss  # fmt: skip
        else:
            loss = fastpref.linear_token_logprobs(
                self.hidden, self.weight, self.labels, mode=self.form, **self.group
            ).sum()
        loss.backward()
        for leaf in self.inputs:
            leaf.grad = None

    def payload(self) -> int:
        """Bytes of this rank's contributions to a step's all-reduces, after the formulas of docs/scaling.md."""
        if not self.group:
            return 0
        return 24 * self.scored + (0 if self.form == "logits" else 4 * self.scored * H)

    def gradients(self) -> int:
        """Bytes of the gradients a step makes."""
        return sum(leaf.nbytes for leaf in self.inputs)


def counted(run: Callable[[], object]) -> int:
    """Bytes that this rank gives to all-reduces in a call."""
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


def work(out: Path, rounds: int) -> None:
    """What each rank does: every form in both dtypes; the first writes down what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for name in DTYPES:
        for form in FORMS:
            problem = Problem(form, DTYPES[name])
            problem.step()
            payload = counted(problem.step)
            fastpref.release_memory()
            dist.barrier()
            peak = harness.peak_bytes(problem.step) - problem.gradients()
            dist.barrier()
            wire, seconds = int(LOOPBACK.read_text()), []
            for _ in range(rounds):
                dist.barrier()
                start = time.perf_counter()
                problem.step()
                seconds.append(time.perf_counter() - start)
            dist.barrier()
            wire = int(LOOPBACK.read_text()) - wire
            own = {"payload": payload, "expected": problem.payload(), "peak": peak, "seconds": seconds}
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
            rows.append({
                "name": form, "dtype": name, "ranks": len(ranks), "scored": problem.scored,
                # A step is as slow as its slowest rank.
                "ms": 1e3 * statistics.median(max(times) for times in zip(*(r["seconds"] for r in ranks), strict=True)),
                "payload_kib": payload / 2**10, "expected_kib": problem.payload() / 2**10,
                # A ring of two sends each rank's payload once; what the loopback counts is both ranks'.
                "wire_kib": wire / rounds / len(ranks) / 2**10,
                "peak_mib": max(r["peak"] for r in ranks) / harness.MIB,
            })  # fmt: skip
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


COLUMNS = (
    ("", "name", "{}"), ("dtype", "dtype", "{}"), ("ranks", "ranks", "{}"), ("ms", "ms", "{:.0f}"),
    ("× one rank", "speedup", "{:.2f}"), ("KiB given to all-reduces a rank", "payload_kib", "{:.1f}"),
    ("by the formula", "expected_kib", "{:.1f}"), ("KiB on the wire a rank", "wire_kib", "{:.0f}"),
    ("MiB a rank beyond gradients", "peak_mib", "{:.0f}"),
)  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="Folder for the CSV and the markdown table")] = Path("benchmarks/results"),
    rounds: Annotated[int, typer.Option(min=1, help="Steps of every row")] = 9,
) -> None:
    """Measure on this machine's CPU."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows: harness.Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in track(RANKS, description="Ranks", console=console):
            found = Path(folder) / f"{ranks}.json"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [sys.executable, *launch, __file__, str(found), str(rounds)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, check=True)
            rows += json.loads(found.read_text())
    one = {(row["name"], row["dtype"]): row["ms"] for row in rows if row["ranks"] == 1}
    for row in rows:
        row["speedup"] = one[row["name"], row["dtype"]] / row["ms"]
    off = [row for row in rows if row["payload_kib"] != row["expected_kib"]]
    notes = [f"Payloads as the formulas have them: {'every one' if not off else f'not those of {off}'}."]
    title = f"Forward + backward, B={B}, T={T}, half of the tokens scored, H={H}, V={V}, one thread a rank, gloo"
    harness.show(rows, COLUMNS, notes, title, console)
    harness.write(rows, COLUMNS, notes, out / "scaling", title)


if __name__ == "__main__":
    typer.run(work if "RANK" in os.environ else main)

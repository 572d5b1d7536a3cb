"""Log-probs from logits, forward and backward: ours, the peers, and the copy of the logits that is the floor.

    python benchmarks/bench_logprobs.py     # the table of the README, under both allocators
    pytest benchmarks/bench_logprobs.py     # the same rows for pytest-benchmark, under the allocator it starts with

Every row is held against float64 before it is timed. Every round takes all rows, in an order of its own, so that a
drift of the machine's speed reaches all of them alike.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

import fastpref
from benchmarks import harness, peers
from benchmarks.harness import ALLOCATORS, DTYPES, MIB, Case, child, interleaved
from benchmarks.peers import Entry

B, T, V = 8, 128, 50304
GPU_B, GPU_T, GPU_V = 8, 1024, 128256


def _ours(in_place: bool) -> peers.Function:
    return lambda logits, labels: fastpref.token_logprobs(logits, labels, shift=False, inplace_backward=in_place)


FRESH = Entry("fastpref", lambda: _ours(False))
IN_PLACE = Entry("fastpref, in place", lambda: _ours(True), in_place=True)
CPU = (FRESH, IN_PLACE, *peers.CPU)
GPU = (FRESH, IN_PLACE, *peers.GPU)


class _Model(torch.autograd.Function):
    """Logits as a model gives them: no leaf, and their gradient goes to `received`, or is dropped."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor, received: list[Tensor] | None) -> Tensor:
        ctx.received = received
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.received is not None:
            ctx.received.append(grads[0])
        return grads[0].new_zeros((), dtype=torch.float32), None, None


def forward_backward(
    function: peers.Function, logits: Tensor, labels: Tensor, received: list[Tensor] | None = None
) -> Tensor:
    """One step: log-probs, and the gradient of their sum."""
    parameter = torch.zeros((), device=logits.device, requires_grad=True)
    logps = function(_Model.apply(parameter, logits, received), labels)  # type: ignore[arg-type]
    logps.backward(torch.ones_like(logps))
    return logps.detach()


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) as a trained model's spread, labels (B, T), all of them scored."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape, dtype=dtype, device=device).normal_(0, 3, generator=generator)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator, device=device)


def error(found: Tensor, truth: Tensor) -> float:
    """The largest absolute difference, a sequence at a time where there is a vocabulary."""
    if found.dim() > 2:
        return max(error(f, t) for f, t in zip(found, truth, strict=True))
    return (found.double() - truth).abs().max().item()


class Gate:
    """The float64 answer on given logits, and how far from it a row may be: 2 × eager's own error + 4 ulp."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.logits, self.labels = logits, labels
        logps, gradients = [], []
        for z, y in zip(logits, labels, strict=True):  # a sequence at a time: float64 is wide
            leaf = z.double().requires_grad_()
            values = fastpref.reference.token_logprobs(leaf, y, shift=False)
            gradients += torch.autograd.grad(values.sum(), leaf)
            logps.append(values.detach())
        self.truth = {"logps": torch.stack(logps), "gradient": torch.stack(gradients)}
        self.limit = {}
        for name, eager in self.errors(peers.eager, in_place=False).items():
            largest = self.truth[name].abs().max().item()
            ulp = torch.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(largest))
            self.limit[name] = 2 * eager + 4 * ulp

    def errors(self, function: peers.Function, in_place: bool) -> dict[str, float]:
        """The largest errors of log-probs, per token where only their sum is given, and of their gradient."""
        received: list[Tensor] = []
        logps = forward_backward(function, self.logits.clone() if in_place else self.logits, self.labels, received)
        truth = self.truth["logps"]
        off = error(logps, truth) if logps.dim() else error(logps, truth.sum()) / truth.numel()
        return {"logps": off, "gradient": error(received[0], self.truth["gradient"])}

    def check(self, entry: Entry, function: peers.Function) -> dict[str, float]:
        """An entry's errors, as fields of its row; raises where one is above its limit."""
        errors = self.errors(function, entry.in_place)
        for name, off in errors.items():
            if not off <= self.limit[name]:
                raise ValueError(f"{name} off by {off:.1e}, more than {self.limit[name]:.1e}: not timed")
        return {f"error_{name}": off for name, off in errors.items()}


def floors(logits: Tensor) -> dict[str, Case]:
    """One read of the logits, then one read and one write."""
    kept = torch.empty_like(logits)
    words = logits.view(torch.float32)  # the fastest reader there is; what it sums does not matter
    return {
        "read + copy": Case(lambda: (words.sum(), logits.clone())),
        "read + copy, into kept memory": Case(lambda: (words.sum(), kept.copy_(logits))),
    }


def case(entry: Entry, function: peers.Function, logits: Tensor, labels: Tensor, forward: bool = False) -> Case:
    """A step of an entry, on logits of its own where it overwrites them."""
    given = logits.clone() if entry.in_place else logits
    before = (lambda: given.copy_(logits)) if entry.in_place else (lambda: None)
    if forward:
        parameter = torch.zeros((), device=logits.device, requires_grad=True)
        return Case(lambda: function(_Model.apply(parameter, given, None), labels), before)  # type: ignore[arg-type]
    return Case(lambda: forward_backward(function, given, labels), before)


def timed_rows(device: str, name: str, rounds: int) -> list[dict[str, Any]]:
    """Every row of one dtype: checked, then timed in turn. What cannot be loaded or is wrong is a row that says so."""
    cuda = device == "cuda"
    logits, labels = inputs((GPU_B, GPU_T, GPU_V) if cuda else (B, T, V), DTYPES[name], device)
    gate = Gate(logits, labels)
    rows: dict[str, dict[str, Any]] = {}
    cases: dict[str, Case] = {}
    for entry in GPU if cuda else CPU:
        rows[entry.name] = {"passes": "forward + backward"}
        try:
            function = entry.load()
            rows[entry.name] |= gate.check(entry, function)
        except Exception as problem:
            rows[entry.name]["problem"] = " ".join([type(problem).__name__, *str(problem).strip().splitlines()[-1:]])
            continue
        cases[entry.name] = case(entry, function, logits, labels)
        if cuda:
            forward = f"{entry.name}, forward"
            rows[forward] = {"passes": "forward"}
            cases[forward] = case(entry, function, logits, labels, forward=True)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            cases[entry.name].run()
            gradient = 0 if entry.in_place else logits.nbytes
            rows[entry.name]["peak_mib"] = (torch.cuda.max_memory_allocated() - held - gradient) / MIB
    del gate
    for floor, floor_case in floors(logits).items():
        rows[floor], cases[floor] = {"passes": "forward + backward"}, floor_case
    if cuda:
        kept = torch.empty_like(logits)
        rows["copy"], cases["copy"] = {"passes": "copy"}, Case(lambda: kept.copy_(logits))
    seconds = interleaved(cases, rounds, cuda)
    medians = {case_name: statistics.median(taken) for case_name, taken in seconds.items()}
    for case_name, taken in seconds.items():
        rows[case_name] |= {"ms": 1e3 * medians[case_name], "ms_min": 1e3 * min(taken), "ms_max": 1e3 * max(taken)}
        for mine, field in ((FRESH, "over_fresh"), (IN_PLACE, "over_in_place")):
            same = mine.name + (", forward" if rows[case_name]["passes"] == "forward" else "")
            if same in medians:
                rows[case_name][field] = medians[case_name] / medians[same]
        if cuda:
            moved = {"forward": 1, "copy": 2, "forward + backward": 3}[rows[case_name]["passes"]] * logits.nbytes
            rows[case_name]["tb_per_s"] = moved / medians[case_name] / 1e12
            rows[case_name]["of_copy"] = rows[case_name]["tb_per_s"] / (2 * logits.nbytes / medians["copy"] / 1e12)
    known = {"device": device, "dtype": name, "rounds": rounds, **peers.provenance()}
    return [{"name": row, **values, **known} for row, values in rows.items()]


def peak_mib(name: str, entry_name: str) -> float:
    """MiB of forward and backward beyond logits and gradient; meant for a process of its own."""
    entry = next(entry for entry in CPU if entry.name == entry_name)
    function = entry.load()
    logits, labels = inputs((B, T, V), DTYPES[name])
    # What is compiled, built or read from disk on a first call is not a step's memory.
    small = (B, T, V) if entry.compiles else (2, 2, 64)
    forward_backward(function, *inputs(small, DTYPES[name]))
    received: list[Tensor] = []
    peak = harness.peak_bytes(lambda: forward_backward(function, logits, labels, received))
    return (peak - (0 if entry.in_place else logits.nbytes)) / MIB


def cpu_rows(rounds: int, console: Console) -> list[dict[str, Any]]:
    """Every dtype under every allocator, each in a process of its own, and each row's memory in another."""
    found = []
    for allocator, environment in ALLOCATORS.items():
        for name in DTYPES:
            console.print(f"[dim]{name}, {allocator} allocator: checking and timing {len(CPU)} rows")
            with child(environment) as pool:
                rows = pool.submit(timed_rows, "cpu", name, rounds).result()
            for row in rows:
                row["allocator"] = allocator
                if row["name"] in {entry.name for entry in CPU} and "problem" not in row:
                    with child(environment) as pool:
                        row["peak_mib"] = pool.submit(peak_mib, name, row["name"]).result()
            found += rows
    return found


# Heading, field, how it is written.
COLUMNS = (
    ("", "name", "{}"), ("dtype", "dtype", "{}"), ("allocator", "allocator", "{}"), ("ms", "ms", "{:.1f}"),
    ("× ours", "over_fresh", "{:.2f}"), ("× ours in place", "over_in_place", "{:.2f}"),
    ("of copy bandwidth", "of_copy", "{:.0%}"), ("MiB beyond logits and gradient", "peak_mib", "{:.1f}"),
    ("error of log-probs", "error_logps", "{:.1e}"), ("of the gradient", "error_gradient", "{:.1e}"),
)  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What was not timed and why, and ours against the fastest peer, for every dtype and allocator."""
    lines = [f"{row['name']}, {row['dtype']}: {row['problem']}" for row in rows if "problem" in row]
    for allocator in ALLOCATORS:
        for name in DTYPES:
            ours = {row["name"]: row for row in rows if (row["dtype"], row.get("allocator")) == (name, allocator)}
            timed = [ours[peer.name] for peer in peers.CPU if "ms" in ours.get(peer.name, {})]
            if timed:
                best = min(timed, key=lambda row: row["ms"])
                lines.append(
                    f"{name}, {allocator} allocator: {best['over_fresh']:.1f}× the fastest peer ({best['name']}), "
                    f"{best['over_in_place']:.1f}× in place"
                )
    return lines


def main(
    out: Annotated[Path, typer.Option(help="Folder for the CSV and the markdown table")] = Path("benchmarks/results"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all rows")] = 15,
) -> None:
    """Measure on this machine's CPU, and on its GPU where there is one."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    title = f"Forward + backward, B={B}, T={T}, V={V}, {torch.get_num_threads()} threads"
    rows = cpu_rows(rounds, console)
    harness.show(rows, COLUMNS, verdict(rows), title, console)
    harness.write(rows, COLUMNS, verdict(rows), out / "logprobs", title)
    if torch.cuda.is_available():
        title = f"{torch.cuda.get_device_name()}, N={GPU_B * GPU_T}, V={GPU_V}"
        rows = timed_rows("cuda", "bf16", 5 * rounds)
        harness.show(rows, COLUMNS, verdict(rows), title, console)
        harness.write(rows, COLUMNS, verdict(rows), out / "logprobs_gpu", title)


@pytest.fixture(scope="module", params=DTYPES)
def gate(request: pytest.FixtureRequest) -> Gate:
    return Gate(*inputs((B, T, V), DTYPES[request.param]))


@pytest.mark.parametrize("entry", CPU, ids=lambda entry: entry.name)
def test_forward_backward(entry: Entry, gate: Gate, benchmark: Any) -> None:
    """Ours is timed before each round of the row, so their ratio is of the same moments."""
    try:
        function = entry.load()
    except ImportError as problem:
        pytest.skip(str(problem))
    benchmark.extra_info.update(gate.check(entry, function))
    row, ours = (case(e, f, gate.logits, gate.labels) for e, f in ((entry, function), (FRESH, FRESH.load())))
    before: list[float] = []

    def setup() -> None:
        row.before()
        before.append(ours.seconds(cuda=False))

    benchmark.pedantic(row.run, setup=setup, rounds=10, warmup_rounds=1)
    benchmark.extra_info["over_fastpref"] = benchmark.stats.stats.median / statistics.median(before[1:])


@pytest.mark.parametrize("name", ["read + copy", "read + copy, into kept memory"])
def test_floor(name: str, gate: Gate, benchmark: Any) -> None:
    benchmark.pedantic(floors(gate.logits)[name].run, rounds=10, warmup_rounds=1)


if __name__ == "__main__":
    typer.run(main)

"""Log-probs and DPO from hidden states, forward and backward: ours, the peers, and the bare products.

    python benchmarks/bench_linear.py     # the table of the README, under both allocators
    pytest benchmarks/bench_linear.py     # the same rows for pytest-benchmark, under the allocator it starts with

Every row is held against float64 before it is timed; a peer that is further off than ours may be is timed all the same,
and marked, with its error beside it. Every round takes all rows, in an order of its own.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

import fastpref
from benchmarks import harness, peers
from benchmarks.harness import ALLOCATORS, DTYPES, MIB, Case, child, interleaved
from fastpref_kernels import ops

B, T, V = 4, 256, 65537
WIDTHS = (512, 1024)
LONGER = 8  # how much longer the sequences are of the second reading of memory
TILE = 4096  # columns of a product of the floor
CHUNK_ROWS = 1024  # our default on a CPU: up to so many positions a gradient is rounded a tile at a time
BETA = 0.1
# A log-prob may be off by this, where the labels are far from the top by as much as here.
GATE = {"fp32": 1e-5, "bf16": 1e-4}


@dataclass(frozen=True)
class Problem:
    """Leaves, labels of which each sequence's first half is ignored, and the gradient that comes from above."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, H: int, length: int = T) -> Problem:
        """A head whose logits spread by about 3."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(B, length, H, generator=generator).to(dtype).requires_grad_()
        weight = torch.empty(V, H).normal_(0, 3 / H**0.5, generator=generator).to(dtype).requires_grad_()
        labels = torch.randint(V, (B, length), generator=generator)
        labels[:, : length // 2] = -100
        return cls(hidden, weight, labels, torch.rand(B * (length - length // 2), generator=generator))

    def clear(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None

    def step(self, function: peers.LinearFunction) -> Tensor:
        """Log-probs of the scored rows, or a loss, and the gradients of hidden and weight."""
        self.clear()
        out = function(self.hidden, self.weight, self.labels)
        out.backward(self.upstream.to(out.dtype) if out.dim() else None)
        return out.detach()


def _ours(mode: str) -> peers.LinearFunction:
    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return fastpref.linear_token_logprobs(hidden, weight, labels, shift=False, mode=mode)[labels != -100]

    return logprobs


def _dpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastpref.linear_dpo_loss(
        hidden, weight, labels, beta=BETA, shift=False, reference_free=True
    ).loss  # fmt: skip


def dpo_of(logps: Tensor) -> Tensor:
    """The DPO loss of the scored rows' log-probs, as its formula."""
    chosen, rejected = logps.view(B, -1).sum(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


SAVE = peers.LinearEntry("fastpref, save", lambda: _ours("save"))
RECOMPUTE = peers.LinearEntry("fastpref, recompute", lambda: _ours("recompute"))
DPO = peers.LinearEntry("fastpref, linear_dpo_loss", lambda: _dpo)
OURS = (SAVE, RECOMPUTE, DPO)
ENTRIES = (*OURS, *peers.LINEAR)


def relative(found: Tensor | None, truth: Tensor) -> float:
    """The largest error, relative to the largest value."""
    assert found is not None
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


class Gate:
    """The float64 answers for one problem, and how far from them ours may be.

    A log-prob by `GATE`, the loss by what that can move it, gradients by 2 × eager's own error + 4 ulp of the largest,
    and a loss's also by what rounding two sequences' log-probs to float32 does to its argument.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        logps, *of_logps = self._truth(problem.upstream.double())
        leaf = logps.requires_grad_()
        loss = dpo_of(leaf)
        _, *of_loss = self._truth(*torch.autograd.grad(loss, leaf))
        self.truth = {"logps": (logps.detach(), *of_logps), "loss": (loss.detach(), *of_loss)}
        name = next(name for name, dtype in DTYPES.items() if dtype == problem.weight.dtype)
        first = {"logps": GATE[name], "loss": BETA * len(logps) / B * 2 * GATE[name]}
        eager = {"logps": peers.linear_eager, "loss": lambda *given: dpo_of(peers.linear_eager(*given))}
        ulp = torch.finfo(torch.float32).eps * logps.detach().view(B, -1).sum(-1).abs().max().item()
        slack = {"logps": 4 * torch.finfo(problem.weight.dtype).eps}
        slack["loss"] = slack["logps"] + 2 * BETA * ulp
        self.limits = {}
        for kind, function in eager.items():
            _, *gradients = self.errors(function)[1].values()
            self.limits[kind] = (first[kind], *(2 * off + slack[kind] for off in gradients))

    def _truth(self, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, and the gradients of hidden and weight; a few rows at a time, as float64 is wide."""
        scored = self.problem.labels != -100
        hidden, labels = self.problem.hidden.detach()[scored].double(), self.problem.labels[scored]
        weight = self.problem.weight.detach().double()
        d_weight = torch.zeros_like(weight)
        logps, d_hidden = [], []
        for x, y, g in zip(hidden.split(64), labels.split(64), upstream.split(64), strict=True):
            log_p = (x @ weight.T).log_softmax(-1)
            logps.append(log_p.gather(-1, y[:, None])[:, 0])
            gradient = log_p.exp_().mul_(-g[:, None])
            gradient[torch.arange(len(y)), y] += g
            d_hidden.append(gradient @ weight)
            d_weight += gradient.T @ x
        whole = torch.zeros(self.problem.hidden.shape, dtype=torch.float64)
        whole[scored] = torch.cat(d_hidden)
        return torch.cat(logps), whole, d_weight

    def errors(self, function: peers.LinearFunction) -> tuple[str, dict[str, float]]:
        """What it makes, and errors: of log-probs or loss, absolute; of gradients, relative to the largest."""
        out = self.problem.step(function)
        kind = "logps" if out.dim() else "loss"
        truth, d_hidden, d_weight = self.truth[kind]
        return kind, {
            "error": (out.double() - truth).abs().max().item(),
            "error_hidden": relative(self.problem.hidden.grad, d_hidden),
            "error_weight": relative(self.problem.weight.grad, d_weight),
        }

    def check(self, entry: peers.LinearEntry, function: peers.LinearFunction) -> dict[str, Any]:
        """An entry's errors, as fields of its row, and whether they are within ours; raises where ours are not."""
        out, errors = self.errors(function)
        limits = self.limits[out]
        within = all(off <= limit for off, limit in zip(errors.values(), limits, strict=True))
        if entry in OURS and not within:
            raise AssertionError(f"{entry.name}: {errors} is further off than {limits}")
        return {**errors, "gate": "within" if within else "beyond"}


def bare_products(problem: Problem, logits: int) -> Callable[[], object]:
    """The library's products on the scored rows and nothing else: `logits` times the logits, and both gradients'.

    A tile of columns at a time into kept memory, in the operands' dtype: bfloat16 products round their results, which
    is less than ours do.
    """
    scored = problem.labels != -100
    x, w = problem.hidden.detach()[scored], problem.weight.detach()
    tile = torch.rand(len(x), TILE).to(x.dtype)
    z, d_x, d_w = torch.empty_like(tile), torch.zeros_like(x), torch.empty_like(w)

    def run() -> None:
        for begin in range(0, V, TILE):
            columns = w[begin : begin + TILE]
            n = len(columns)
            for _ in range(logits):
                torch.mm(x, columns.t(), out=z[:, :n])
            torch.addmm(d_x, tile[:, :n], columns, out=d_x)
            torch.mm(tile[:, :n].t(), x, out=d_w[begin : begin + n])

    return run


def timed_rows(name: str, H: int, rounds: int) -> harness.Rows:
    """Every row of one dtype and width: checked, then timed in turn. What cannot be run is a row that says so."""
    problem = Problem.of(DTYPES[name], H)
    gate = Gate(problem)
    rows: dict[str, dict[str, Any]] = {}
    cases: dict[str, Case] = {}
    for entry in ENTRIES:
        try:
            function = entry.load()
            rows[entry.name] = gate.check(entry, function)
        except Exception as met:
            if entry in OURS:
                raise
            rows[entry.name] = {"problem": " ".join([type(met).__name__, *str(met).strip().splitlines()[-1:]])}
            continue
        cases[entry.name] = Case(lambda function=function: problem.step(function))
    del gate
    for label, logits in (("bare products, 6NVH", 1), ("bare products, 8NVH", 2)):
        rows[label], cases[label] = {}, Case(bare_products(problem, logits))
    seconds = interleaved(cases, rounds, cuda=False)
    medians = {case: statistics.median(taken) for case, taken in seconds.items()}
    for case, taken in seconds.items():
        rows[case] |= {"ms": 1e3 * medians[case], "ms_min": 1e3 * min(taken), "ms_max": 1e3 * max(taken)}
        rows[case] |= {
            "over_save": medians[case] / medians[SAVE.name],
            "over_recompute": medians[case] / medians[RECOMPUTE.name],
            "over_dpo": medians[case] / medians[DPO.name],
        }
    known = {"dtype": name, "H": H, "rounds": rounds, **peers.provenance()}
    return [{"name": row, **values, **known} for row, values in rows.items()]


def peak_mib(name: str, H: int, entry_name: str, length: int) -> dict[str, float]:
    """MiB of a step beyond the gradients, and without the weight gradient's float32 buffer where ours keep one whole.

    For a process of its own.
    """
    entry = next(entry for entry in ENTRIES if entry.name == entry_name)
    function = entry.load()
    problem = Problem.of(DTYPES[name], H, length)
    # What is compiled, built or read from disk on a first call is not a step's memory.
    limit = ops.loss_chunk_rows(problem.weight, problem.weight.shape[0], problem.weight.dtype)
    small = Problem.of(DTYPES[name], 8, limit if entry == DPO else 4)  # a loss of two chunks
    (problem if entry.compiles else small).step(function)
    del small
    fastpref.release_memory()
    problem.clear()
    gradients = problem.hidden.nbytes + problem.weight.nbytes
    peak = (harness.peak_bytes(lambda: problem.step(function)) - gradients) / MIB
    if entry not in OURS:
        return {"peak_mib": peak}
    # A float32 gradient is its own buffer, and rows of one chunk need none. A loss of several chunks, if its pairs fit
    # in them, keeps one for its backward.
    scored = int((problem.labels != -100).sum())
    in_forward = entry == DPO and scored // (B // 2) <= limit < scored
    buffered = in_forward or (problem.weight.dtype != torch.float32 and problem.labels.numel() > CHUNK_ROWS)
    return {"peak_mib": peak, "scratch_mib": peak - (4 * problem.weight.numel() / MIB if buffered else 0)}


def all_rows(rounds: int, console: Console) -> harness.Rows:
    """Every dtype and width under every allocator, each in a process of its own, and each row's memory in another."""
    found: harness.Rows = []
    names = [entry.name for entry in ENTRIES]
    with Progress(console=console) as progress:
        runs = [(a, name, H) for a in ALLOCATORS for name in DTYPES for H in WIDTHS]
        task = progress.add_task("", total=len(runs) * (1 + len(names)))
        for allocator, name, H in runs:
            progress.update(task, description=f"{name}, H={H}, {allocator} allocator")
            with child(ALLOCATORS[allocator]) as pool:
                rows = pool.submit(timed_rows, name, H, rounds).result()
            progress.advance(task)
            for row in rows:
                row["allocator"] = allocator
                if row["name"] not in names:
                    continue
                if "problem" not in row:
                    lengths = {"": T}
                    if row["name"] in (RECOMPUTE.name, DPO.name):
                        lengths["_longer"] = LONGER * T
                    for suffix, length in lengths.items():
                        with child(ALLOCATORS[allocator]) as pool:
                            peaks = pool.submit(peak_mib, name, H, row["name"], length).result()
                        row |= {field + suffix: value for field, value in peaks.items()}
                progress.advance(task)
            found += rows
    return found


COLUMNS = (
    ("", "name", "{}"), ("dtype", "dtype", "{}"), ("H", "H", "{}"), ("allocator", "allocator", "{}"),
    ("ms", "ms", "{:.0f}"), ("× save", "over_save", "{:.2f}"), ("× recompute", "over_recompute", "{:.2f}"),
    ("× linear_dpo_loss", "over_dpo", "{:.2f}"),
    ("MiB beyond gradients", "peak_mib", "{:.0f}"), ("and fp32 buffer", "scratch_mib", "{:.0f}"),
    (f"T × {LONGER}: MiB", "peak_mib_longer", "{:.0f}"), ("beyond buffer", "scratch_mib_longer", "{:.0f}"),
    ("error of log-probs or loss", "error", "{:.1e}"),
    ("of hidden's gradient", "error_hidden", "{:.1e}"), ("of the weight's", "error_weight", "{:.1e}"),
    ("our gate", "gate", "{}"),
)  # fmt: skip

# Of the default allocator: what, dtype, H, (row, field), how it must compare, and with what.
TRL = "TRL chunked log-probs, scored rows"
TARGETS = (
    *((f"{peer} over save", dtype, 512, (peer, "over_save"), ">=", least) for dtype, peer, least in
      (("fp32", TRL, 3.0), ("fp32", "eager", 3.0), ("bf16", TRL, 5.0), ("bf16", "eager", 2.5))),
    *((f"MiB of {row}", dtype, 512, (row, "scratch_mib"), "<", most) for dtype in DTYPES
      for row, most in ((SAVE.name, 400.0), (RECOMPUTE.name, 100.0), (DPO.name, 100.0))),
    *((f"MiB of {row}, T × {LONGER}", dtype, 512, (row, "scratch_mib_longer"), "<", 100.0) for dtype in DTYPES
      for row in (RECOMPUTE.name, DPO.name)),
    *((f"{label} over bare products", dtype, 1024, (floor, field), ">=", 1 / 1.3) for dtype in DTYPES
      for label, floor, field in (("save", "bare products, 6NVH", "over_save"),
                                  ("linear_dpo_loss", "bare products, 6NVH", "over_dpo"),
                                  ("recompute", "bare products, 8NVH", "over_recompute"))),
)  # fmt: skip


def verdict(rows: harness.Rows) -> list[str]:
    """What was not timed and why, and every target beside what was measured, in the first allocator."""
    lines = [f"{row['name']}, {row['dtype']}: {row['problem']}" for row in rows if "problem" in row]
    allocator = next(iter(ALLOCATORS))
    for what, dtype, H, (name, field), sign, limit in TARGETS:
        key = {"name": name, "dtype": dtype, "H": H, "allocator": allocator}
        row = next((row for row in rows if all(row.get(field) == value for field, value in key.items())), {})
        if field not in row:
            continue
        value = row[field]
        met = "met" if (value >= limit if sign == ">=" else value < limit) else "missed"
        if "bare" in what:  # said as it is meant: how many times the products it takes
            what, value, sign, limit = what.replace(" over ", ", times the "), 1 / value, "<=", 1 / limit
        lines.append(f"{dtype}, H={H}: {what}: {value:.2f} (target {sign} {limit:.4g}): {met}")
    return lines


def main(
    out: Annotated[Path, typer.Option(help="Folder for the CSV and the markdown table")] = Path("benchmarks/results"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all rows")] = 7,
) -> None:
    """Measure on this machine's CPU."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    title = f"Forward + backward, B={B}, T={T}, half of the tokens scored, V={V}, {torch.get_num_threads()} threads"
    rows = all_rows(rounds, console)
    harness.show(rows, COLUMNS, verdict(rows), title, console)
    harness.write(rows, COLUMNS, verdict(rows), out / "linear", title)


@pytest.fixture(scope="module", params=DTYPES)
def gate(request: pytest.FixtureRequest) -> Gate:
    return Gate(Problem.of(DTYPES[request.param], WIDTHS[0]))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_forward_backward(entry: peers.LinearEntry, gate: Gate, benchmark: Any) -> None:
    try:
        function = entry.load()
    except ImportError as problem:
        pytest.skip(str(problem))
    benchmark.extra_info.update(gate.check(entry, function))
    benchmark.pedantic(lambda: gate.problem.step(function), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    typer.run(main)

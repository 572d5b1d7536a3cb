"""Measure log-probs and DPO from hidden states, forward and backward: fastpref, its peers, and the bare products.

`fastpref bench linear` runs this subject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from benchmarks import harness, peers
from benchmarks.bench_logprobs import BOTH, VOCABULARIES
from benchmarks.harness import DTYPES, MIB, Case, Floor, Options, furthest, turns, ulps
from benchmarks.peers import IGNORED, Entry
from benchmarks.store import Row, Rows
from fastpref_kernels import ops

BETA = 0.1
TILE = 4096  # columns that the floor multiplies at a time
CHUNK_ROWS = 1024  # the default on a CPU; up to this many positions, a gradient is rounded a tile at a time
# The largest error allowed in a log-prob of fastpref, for labels as improbable as those here.
GATE = {"fp32": 1e-5, "bf16": 1e-4}
SIX, EIGHT = "bare products, 6NVH", "bare products, 8NVH"


def _ours(mode: str) -> Callable[..., Tensor]:
    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return fastpref.linear_token_logprobs(hidden, weight, labels, shift=False, mode=mode)[labels != IGNORED]

    return logprobs


def _dpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    found = fastpref.linear_dpo_loss(hidden, weight, labels, beta=BETA, shift=False, reference_free=True)
    return found.loss


SAVE = Entry("fastpref, save", lambda: _ours("save"), "fastpref")
RECOMPUTE = Entry("fastpref, recompute", lambda: _ours("recompute"), "fastpref")
DPO = Entry("fastpref, linear_dpo_loss", lambda: _dpo, "fastpref", "loss")
OURS = (SAVE, RECOMPUTE, DPO)


class Leaves:
    """Hidden states, weight and labels; the first share `masked` of the labels of each sequence is ignored.

    "flat" logits have a standard deviation of about 3 and do not favour the label; "peaked" logits do.
    """

    def __init__(self, axes: dict[str, Any], device: str, seed: int = 0) -> None:
        B, T, V, H = (axes[name] for name in "BTVH")
        dtype, generator = DTYPES[axes["dtype"]], torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(B, T, H, generator=generator, device=device)
        weight = torch.empty(V, H, device=device).normal_(0, 3 / H**0.5, generator=generator)
        self.labels = torch.randint(V, (B, T), generator=generator, device=device)
        if axes["logits"] == "peaked":
            hidden += math.log(V) * F.normalize(weight[self.labels], dim=-1)  # rows of the head are 3 long
        self.labels[:, : int(axes["masked"] * T)] = IGNORED
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_()

    def step(self, function: Callable[..., Tensor], upstream: Tensor) -> Tensor:
        """Run a forward and backward, which leaves gradients of hidden and weight, and return the value."""
        self.clear()
        out = function(self.hidden, self.weight, self.labels)
        out.backward(upstream.to(out.dtype) if out.dim() else None)
        return out.detach()

    def clear(self) -> None:
        """Release the gradients."""
        self.hidden.grad = self.weight.grad = None


def dpo_of(logps: Tensor, sequences: int) -> Tensor:
    """Return the DPO loss of the log-probs of the scored rows, by its formula."""
    chosen, rejected = logps.view(sequences, -1).sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def relative(found: Tensor | None, truth: Tensor) -> float:
    """Return the largest error relative to the largest value."""
    assert found is not None
    return furthest(found, truth) / truth.abs().max().item()


class Problem:
    """A shape: its inputs, the float64 answers, and the errors that are allowed."""

    def __init__(self, axes: dict[str, Any], device: str) -> None:
        self.axes, self.device = axes, device
        size = axes["V"] * axes["H"] * DTYPES[axes["dtype"]].itemsize
        self.turns = [Leaves(axes, device, seed) for seed in range(turns(size, device))]
        self.leaves = self.turns[0]
        self.scored = self.leaves.labels != IGNORED
        self.count = int(self.scored.sum())
        generator = torch.Generator().manual_seed(1)
        self.upstream = torch.rand(self.count, generator=generator).to(device)
        self.answer, self.limit = cache(self._answer), cache(self._limit)

    def _pass(self, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs and the gradients of hidden and weight in float64, computed a few rows at a time."""
        hidden = self.leaves.hidden.detach()[self.scored].double()
        labels, weight = self.leaves.labels[self.scored], self.leaves.weight.detach().double()
        d_weight = torch.zeros_like(weight)
        logps, d_hidden = [], []
        for rows in torch.arange(len(labels), device=labels.device).split(64):
            x, y, g = hidden[rows], labels[rows], upstream[rows]
            log_p = (x @ weight.T).log_softmax(-1)
            logps.append(log_p.gather(-1, y[:, None])[:, 0])
            gradient = log_p.exp_().mul_(-g[:, None])
            gradient[torch.arange(len(y)), y] += g
            d_hidden.append(gradient @ weight)
            d_weight.addmm_(gradient.T, x)
        whole = torch.zeros(self.leaves.hidden.shape, dtype=torch.float64, device=self.device)
        whole[self.scored] = torch.cat(d_hidden)
        return torch.cat(logps), whole, d_weight

    def _answer(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the float64 log-probs, their sum or the loss, and the gradients of hidden and weight."""
        if kind == "logps":
            return self._pass(self.upstream.double())
        leaf = self.answer("logps")[0].clone().requires_grad_()
        value = leaf.sum() if kind == "sum" else dpo_of(leaf, self.axes["B"])
        return value.detach(), *self._pass(torch.autograd.grad(value, leaf)[0])[1:]

    def _limit(self, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the errors allowed to a peer and to fastpref: of the value and of the two gradients.

        A log-prob of a peer may be off by twice the error of eager PyTorch plus 4 ulp, one of fastpref by `GATE`. The
        sum and the loss may be off by what such an error does to them: eager PyTorch may be right by luck in a single
        number, which would then allow nothing. Gradients may be off by twice the error of eager PyTorch plus 4 ulp of
        the largest; those of the loss also by the effect of rounding the log-probs of two sequences to float32.
        """
        reduce = {"logps": lambda x: x, "sum": Tensor.sum, "loss": lambda x: dpo_of(x, self.axes["B"])}[kind]
        _, d_hidden, d_weight = self._errors(lambda *given: reduce(peers.linear_eager(*given)), kind)
        logps = peers.linear_eager(self.leaves.hidden.detach(), self.leaves.weight.detach(), self.leaves.labels)
        truth, *_ = self.answer("logps")
        off = furthest(logps, truth)
        slack = 4 * torch.finfo(DTYPES[self.axes["dtype"]]).eps
        if kind == "loss":
            sums = truth.view(self.axes["B"], -1).sum(-1).abs().max().item()
            slack += 2 * BETA * torch.finfo(torch.float32).eps * sums
        gradients = (2 * d_hidden + slack, 2 * d_weight + slack)
        moves = {"logps": 1.0, "sum": float(self.count), "loss": 2 * BETA * self.count / self.axes["B"]}[kind]
        theirs, ours = moves * (2 * off + ulps(truth, torch.float32)), moves * GATE[self.axes["dtype"]]
        return (theirs, *gradients), (ours, *gradients)

    def _errors(self, function: Callable[..., Tensor], kind: str) -> tuple[float, float, float]:
        out = self.leaves.step(function, self.upstream)
        value, d_hidden, d_weight = self.answer(kind)
        hidden, weight = self.leaves.hidden.grad, self.leaves.weight.grad
        return furthest(out, value), relative(hidden, d_hidden), relative(weight, d_weight)

    def check(self, entry: Entry, function: Callable[..., Tensor]) -> tuple[Row, list[tuple[float, float]]]:
        limits = self.limit(entry.answers)[entry.ours]
        errors = self._errors(function, entry.answers)
        self.leaves.clear()
        row = {"error": errors[0] / (self.count if entry.answers == "sum" else 1), "error_gradient": max(errors[1:])}
        return row, list(zip(errors, limits, strict=True))

    def release(self) -> None:
        self.answer, self.limit = cache(self._answer), cache(self._limit)
        self.clear()

    def clear(self) -> None:
        for leaves in self.turns:
            leaves.clear()

    def cases(self, entry: Entry, function: Callable[..., Tensor]) -> dict[str, Case]:
        leaves = cycle(self.turns)
        return {BOTH: Case(lambda: next(leaves).step(function, self.upstream))}

    def floors(self) -> dict[str, Floor]:
        """Return the matrix products of the scored rows alone: the logits once or twice, and both gradients.

        They run a tile of columns at a time, into memory that is kept, in the dtype of the operands. Products of
        bfloat16 round their results, so they do less than fastpref does.
        """
        x, w = self.leaves.hidden.detach()[self.scored], self.leaves.weight.detach()
        tile = torch.rand(len(x), TILE, device=self.device).to(x.dtype)
        z, d_x, d_w = torch.empty_like(tile), torch.zeros_like(x), torch.empty_like(w)

        def run(logits: int) -> None:
            for begin in range(0, len(w), TILE):
                columns = w[begin : begin + TILE]
                n = len(columns)
                for _ in range(logits):
                    torch.mm(x, columns.t(), out=z[:, :n])
                torch.addmm(d_x, tile[:, :n], columns, out=d_x)
                torch.mm(tile[:, :n].t(), x, out=d_w[begin : begin + n])

        gbytes, gflops, _ = self.work(SIX, BOTH)
        return {
            SIX: Floor(Case(lambda: run(1)), gbytes, gflops),
            EIGHT: Floor(Case(lambda: run(2)), gbytes, gflops * 8 / 6),
        }

    def work(self, name: str, which: str) -> tuple[float, float, str]:
        """Count one read of the operands, one write of the gradients, and three products of the scored rows."""
        operands = self.leaves.weight.nbytes + self.leaves.hidden.nbytes
        return 2 * operands / 1e9, 6 * self.count * self.leaves.weight.numel() / 1e9, SIX

    def made(self, entry: Entry) -> float:
        return (self.leaves.weight.nbytes + self.leaves.hidden.nbytes) / MIB

    def buffer(self, entry: Entry) -> float:
        """Return the MiB of the float32 sums of the weight's gradient, where fastpref keeps them beside it."""
        weight, positions = self.leaves.weight, self.leaves.labels.numel()
        if not entry.ours:
            return 0.0
        # A float32 gradient needs no other buffer, nor do rows of a single chunk. A loss with several chunks that hold
        # whole pairs keeps a buffer for its backward.
        limit = ops.loss_chunk_rows(weight, weight.shape[0], weight.dtype)
        in_forward = entry == DPO and self.count // (self.axes["B"] // 2) <= limit < self.count
        buffered = in_forward or (weight.dtype != torch.float32 and positions > CHUNK_ROWS)
        return 4 * weight.numel() / MIB if buffered else 0.0


def entries(options: Options, axes: dict[str, Any]) -> list[Entry]:
    """Return the entries of fastpref and the peers."""
    return [*OURS, *peers.joined(options.peer_file)["linear"]]


def measure(axes: dict[str, Any], device: str, options: Options, say: Callable[..., None]) -> Rows:
    """Measure one shape and return its rows."""
    made, given = Problem(axes, device), entries(options, axes)
    rows = harness.measured(made, given, device, options, say)
    buffers = {entry.name: made.buffer(entry) for entry in given}
    for row in rows:
        row["scored"] = made.count
        if "peak_mib" in row:
            row["buffer_mib"] = buffers[row["name"]]
    return rows


BASE = {"dtype": "fp32", "B": 4, "T": 256, "V": 65537, "H": 512, "masked": 0.5, "logits": "flat"}
AXES = tuple(BASE)
WIDE = {"H": 1024}


def points(preset: str, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (allocator, axes) of a preset."""
    if preset == "smoke":
        yield "default", {**BASE, "T": 16, "V": 1031, "H": 32}
        return
    if device == "cuda":
        large = {**BASE, "dtype": "bf16", "B": 8, "T": 1024, "V": 128256, "H": 4096, "masked": 0.0}
        yield from (
            ("default", {**large, **more})
            for more in (
                {},
                {"masked": 0.5},
                {"logits": "peaked"},
                {"V": 262144, "H": 1152},
            )
        )
        if preset == "default":
            return
    for dtype in DTYPES:
        base = {**BASE, "dtype": dtype}
        yield "default", base
        if preset == "full":
            yield "default", {**base, **WIDE}
            yield "THP", base
    small = {**BASE, "T": 16, "V": 32000, "H": 256}  # 32 scored rows
    yield "default", {**small, "logits": "peaked"}
    for V in (2688, 8192, *VOCABULARIES):
        yield "default", {**small, "V": V, "sweep": "V"}
    for T in (8, 32, 128, 512, 800):
        yield "default", {**small, "T": T, "V": 4096, "sweep": "N"}

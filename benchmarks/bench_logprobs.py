"""Measure log-probs from logits, forward and backward: fastpref, its peers, and a copy of the logits as the floor.

`fastpref bench logprobs` runs this subject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

import fastpref
from benchmarks import harness, peers
from benchmarks.harness import DTYPES, MIB, PART, Case, Floor, Options, furthest, turns, ulps
from benchmarks.peers import IGNORED, Entry
from benchmarks.store import Row, Rows

BOTH, FORWARD = "forward + backward", "forward"
READ_COPY, READ, COPY = "read + copy into kept memory", "read", "copy into kept memory"
# Float64 gradients of up to this many bytes are kept for all checks of a shape; larger ones are computed again.
KEPT = 2 * 2**30
# Per logit: exponential, subtraction and sum, and in the backward exponential, subtraction and product.
FLOPS = {FORWARD: 3, BOTH: 6}


def _ours(in_place: bool) -> Callable[..., Tensor]:
    return lambda logits, labels: fastpref.token_logprobs(logits, labels, shift=False, inplace_backward=in_place)


OURS = (
    Entry("fastpref", lambda: _ours(False), "fastpref"),
    Entry("fastpref, in place", lambda: _ours(True), "fastpref", in_place=True),
)


class _Model(torch.autograd.Function):
    """Return logits that are no leaf, as from a model; their gradient goes to `received` or is dropped."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor, received: list[Tensor] | None) -> Tensor:
        ctx.received = received
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.received is not None:
            ctx.received.append(grads[0])
        return grads[0].new_zeros((), dtype=torch.float32), None, None


def inputs(axes: dict[str, Any], device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits (B, T, V) and labels (B, T); the first share `masked` of the labels of each sequence is ignored.

    "flat" logits spread as wide as those of a trained model and do not favour the label. In "peaked" logits the label
    has nearly all of the mass, or in a fifth of the rows another token.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (axes["B"], axes["T"], axes["V"])
    logits = torch.empty(shape, dtype=DTYPES[axes["dtype"]], device=device).normal_(0, 3, generator=generator)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator, device=device)
    if axes["logits"] == "peaked":
        other = torch.randint(shape[-1], shape[:-1], generator=generator, device=device)
        right = torch.rand(shape[:-1], generator=generator, device=device) < 0.8
        top = torch.where(right, labels, other)[..., None]
        logits.scatter_(-1, top, 3 * math.log(shape[-1]))
    labels[:, : int(axes["masked"] * axes["T"])] = IGNORED
    return logits, labels


class Problem:
    """A shape: its inputs, the float64 answer, and the error that is allowed."""

    def __init__(self, axes: dict[str, Any], device: str) -> None:
        self.axes, self.device = axes, device
        size = math.prod(axes[name] for name in "BTV") * DTYPES[axes["dtype"]].itemsize
        self.inputs = [inputs(axes, device, seed) for seed in range(turns(size, device))]
        self.logits, self.labels = self.inputs[0]
        self.scored = self.labels != IGNORED
        self.count = int(self.scored.sum())
        self._kept = list(self._truth()) if self.logits.numel() * 8 <= KEPT else None
        found = [(logps, ulps(gradient, self.logits.dtype)) for logps, gradient in self.truth()]
        self.logps, self._spacing = torch.cat([logps for logps, _ in found]), max(spacing for _, spacing in found)
        widened = lambda z, y: fastpref.reference.token_logprobs(z, y, shift=False)  # noqa: E731
        # A peer is allowed twice the error of eager PyTorch in the dtype, fastpref twice that of float32 statistics.
        self.limits, self.own_limits = (self._limits(eager) for eager in (peers.eager, widened))

    @property
    def _rows(self) -> int:
        return max(1, PART // self.axes["V"])

    def _truth(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.logits.flatten(0, 1).split(self._rows), self.labels.flatten().split(self._rows)
        for z, y in zip(*rows, strict=True):
            leaf = z.double().requires_grad_()
            values = fastpref.reference.token_logprobs(leaf[None], y[None], shift=False)[0]
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
            yield values.detach() * (y != IGNORED), gradient

    def truth(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield log-probs and their gradient in float64, a few rows at a time, because all rows may not fit."""
        return self._truth() if self._kept is None else iter(self._kept)

    def _limits(self, eager: Callable[..., Tensor]) -> tuple[float, ...]:
        found = self._errors(Entry("", lambda: eager), eager)
        of_logps = eager(self.logits[:1, :1], self.labels[:1, :1]).dtype
        spacings = ulps(self.logps, of_logps), self._spacing
        return tuple(2 * off + spacing for off, spacing in zip(found, spacings, strict=True))

    def _errors(self, entry: Entry, function: Callable[..., Tensor]) -> tuple[float, float]:
        """Return the largest errors of the log-probs (of a sum, its error per token) and of their gradient."""
        received: list[Tensor] = []
        logps = self._step(function, self.logits.clone() if entry.in_place else self.logits, self.labels, received)
        if entry.answers == "sum":
            off = furthest(logps, self.logps.sum()) / self.count
        else:
            off = furthest(logps.masked_fill(~self.scored, 0).flatten(), self.logps)
        found = received[0].flatten(0, 1).split(self._rows)
        offs = [furthest(part, gradient) for part, (_, gradient) in zip(found, self.truth(), strict=True)]
        return off, torch.tensor(offs).max().item()  # NaN if any is

    def _step(
        self, function: Callable[..., Tensor], logits: Tensor, labels: Tensor, received: list[Tensor] | None = None
    ) -> Tensor:
        """Run the forward, and the backward from the sum of the scored log-probs; return the log-probs."""
        parameter = torch.zeros((), device=logits.device, requires_grad=True)
        logps = function(_Model.apply(parameter, logits, received), labels)
        logps.backward((labels != IGNORED).to(logps.dtype) if logps.dim() else None)
        return logps.detach()

    def check(self, entry: Entry, function: Callable[..., Tensor]) -> tuple[Row, list[tuple[float, float]]]:
        errors = self._errors(entry, function)
        limits = self.own_limits if entry.ours else self.limits
        return {"error": errors[0], "error_gradient": errors[1]}, list(zip(errors, limits, strict=True))

    def clear(self) -> None:
        """Do nothing: no gradient is kept."""

    def release(self) -> None:
        self._kept = None

    def cases(self, entry: Entry, function: Callable[..., Tensor]) -> dict[str, Case]:
        if entry.in_place:
            given = self.logits.clone()
            before = lambda: given.copy_(self.logits)  # noqa: E731
            pairs: Iterator[tuple[Tensor, Tensor]] = cycle([(given, self.labels)])
        else:
            before, pairs = None, cycle(self.inputs)
        parameter = torch.zeros((), device=self.device, requires_grad=True)

        def forward() -> None:
            logits, labels = next(pairs)
            function(_Model.apply(parameter, logits, None), labels)

        cases = {BOTH: Case(lambda: self._step(function, *next(pairs)), before)}
        if self.device == "cuda":
            cases[FORWARD] = Case(forward, before)
        return cases

    def floors(self) -> dict[str, Floor]:
        """Return a read of the scored logits, then one read of these and one write of all logits, and its parts."""
        logits = self.logits
        kept, first = torch.empty_like(logits), int(self.axes["masked"] * self.axes["T"])
        # Read as float32 where possible, which sums fastest; the sum itself does not matter.
        words = logits.view(torch.float32) if logits.shape[-1] * logits.itemsize % 4 == 0 else logits

        def copy() -> None:
            kept[:, :first].zero_()
            kept[:, first:].copy_(logits[:, first:])

        scored, all_rows = (n * logits.shape[-1] * logits.itemsize / 1e9 for n in (self.count, self.labels.numel()))
        read = lambda: words[:, first:].sum()  # noqa: E731
        found = {
            READ_COPY: Floor(Case(lambda: (read(), copy())), 2 * scored + all_rows),
            COPY: Floor(Case(copy), scored + all_rows),
        }
        if self.device == "cuda":
            found[READ] = Floor(Case(read), scored)
        return found

    def work(self, name: str, which: str) -> tuple[float, float, str]:
        """Count one read of the scored logits per pass and one write of the whole gradient."""
        row = self.logits.shape[-1]
        written = self.labels.numel() if which == BOTH else 0
        reads = {FORWARD: 1, BOTH: 2}[which] * self.count
        gbytes = (reads + written) * row * self.logits.itemsize / 1e9
        return gbytes, FLOPS[which] * self.count * row / 1e9, READ_COPY if which == BOTH else READ

    def made(self, entry: Entry) -> float:
        return 0.0 if entry.in_place else self.logits.nbytes / MIB


def entries(options: Options, axes: dict[str, Any]) -> list[Entry]:
    """Return the entries of fastpref and the peers."""
    return [*OURS, *peers.joined(options.peer_file)["logprobs"]]


def measure(axes: dict[str, Any], device: str, options: Options, say: Callable[..., None]) -> Rows:
    """Measure one shape and return its rows."""
    made = Problem(axes, device)
    rows = harness.measured(made, entries(options, axes), device, options, say)
    return [{**row, "scored": made.count} for row in rows]


BASE = {"dtype": "fp32", "B": 8, "T": 128, "V": 50304, "masked": 0.0, "logits": "flat"}
AXES = tuple(BASE)
VOCABULARIES = (32000, 50304, 128256, 151936, 262144)


def points(preset: str, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (allocator, axes) of a preset."""
    if preset == "smoke":
        yield "default", {**BASE, "B": 2, "T": 8, "V": 1031}
        return
    if device == "cuda":
        large = {**BASE, "dtype": "bf16", "T": 1024, "V": 128256}
        yield from (
            ("default", {**large, **more})
            for more in (
                {},
                {"masked": 0.5},
                {"logits": "peaked"},
                {"V": 262144},
                {"B": 1, "T": 64},
                {"dtype": "fp32", "T": 256},
            )
        )
        if preset == "default":
            return
    dtypes = ("bf16",) if device == "cuda" else tuple(DTYPES)
    for dtype in dtypes:
        base = {**BASE, "dtype": dtype}
        if device == "cpu":
            yield "default", base
            yield "THP", base
            yield "default", {**base, "masked": 0.5}
            yield "default", {**base, "logits": "peaked"}
        T = 8 if device == "cpu" else 256
        for V in (2688, 8192, *VOCABULARIES) if dtype == dtypes[0] else VOCABULARIES:
            yield "default", {**base, "T": T, "V": V, "sweep": "V"}
    for T in (2, 8, 32, 128, 200) if device == "cpu" else (8, 32, 128, 512, 1024):
        yield "default", {**BASE, "dtype": dtypes[0], "T": T, "V": 32000, "sweep": "N"}

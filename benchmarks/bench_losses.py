"""Measure losses and advantages: fastpref, the formula in plain PyTorch, and the compiled formula.

`fastpref bench losses` runs this subject. On a CPU fastpref's loss is the formula, so the difference is the cost of its
argument checks. On a GPU it is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from benchmarks import harness, peers
from benchmarks.harness import MIB, Case, Floor, Options, furthest, ulps
from benchmarks.peers import Entry
from benchmarks.store import Row, Rows
from fastpref.losses import TABLE, Loss
from fastpref.testing.accuracy import ulp
from fastpref.testing.evaluate import cast, move

STEP, FORWARD = "forward + backward", "forward"
GAMMA, LAM, BETA = 1.0, 0.95, 0.1
BYTES = "r + v, r − v"
GROUPS = "linear_preference_loss"
MASKS = {"gae": "ragged ends", "gae with holes": "holes too"}


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]


def _value(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.loss


class LossProblem:
    """A loss of `fastpref.losses.TABLE` on B elements, with K answers each if it takes answers."""

    def __init__(self, axes: dict[str, Any], device: str) -> None:
        self.loss = next(loss for loss in TABLE if loss.name == axes["loss"])
        tensors, options = self.loss.example(torch.Generator().manual_seed(0), axes["B"])
        if "K" in axes:
            generator = torch.Generator().manual_seed(0)
            ranks = torch.rand(axes["B"], axes["K"], generator=generator).argsort(-1)
            tensors, options = (torch.randn(axes["B"], axes["K"], generator=generator, dtype=torch.float64), ranks), {}
        self.options = {**self.loss.options, **move(cast(options, torch.float32), device)}
        given = {str(place): tensor for place, tensor in enumerate(tensors)}
        self.leaves = _leaves(list(move(cast(given, torch.float32), device).values()))
        self._answer(self.loss.reference)

    def _answer(self, definition: Callable[..., Any]) -> None:
        wide = [leaf.detach().double() if leaf.requires_grad else leaf for leaf in self.leaves]
        self.truth = self._step(definition, _leaves(wide))
        eager = self._step(definition, self.leaves)
        self.limits = [
            2 * furthest(found, truth) + ulps(truth, torch.float32)
            for found, truth in zip(eager, self.truth, strict=True)
        ]

    def _step(self, function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
        """Return the loss and the gradient of every floating-point argument."""
        for leaf in leaves:
            leaf.grad = None
        loss = _value(function(*leaves, **self.options))
        loss.backward()
        # An argument that a formula does not use has no gradient in eager PyTorch, and zeros from a kernel.
        return [loss.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.requires_grad)]

    def check(self, entry: Entry, function: Callable[..., Any]) -> tuple[Row, list[tuple[float, float]]]:
        pairs = zip(self._step(function, self.leaves), self.truth, strict=True)
        value, *gradients = [furthest(found, truth) for found, truth in pairs]
        row = {"error": value, "error_gradient": max(gradients)}
        return row, list(zip((value, *gradients), self.limits, strict=True))

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def release(self) -> None:
        self.truth = []

    def cases(self, entry: Entry, function: Callable[..., Any]) -> dict[str, Case]:
        return {STEP: Case(lambda: self._step(function, self.leaves))}

    def floors(self) -> dict[str, Floor]:
        return {}

    def work(self, name: str, which: str) -> tuple[float, float, str]:
        """Count a read of every input and a write of every gradient."""
        return sum(2 * leaf.nbytes for leaf in self.leaves if leaf.requires_grad) / 1e9, 0.0, ""

    def made(self, entry: Entry) -> float:
        return 0.0


class GAEProblem:
    """Generalised advantage estimation on float32 rewards and values (B, T), of answers of T/4 to T tokens."""

    def __init__(self, axes: dict[str, Any], device: str) -> None:
        B, T = axes["B"], axes["T"]
        generator = torch.Generator().manual_seed(0)
        rewards, values = torch.randn(2, B, T, generator=generator)
        mask = torch.arange(T) < torch.randint(max(T // 4, 1), T + 1, (B, 1), generator=generator)
        if MASKS[axes["loss"]] == "holes too":
            mask &= torch.rand(B, T, generator=generator) < 0.9
        self.given = tuple(tensor.to(device) for tensor in (rewards, values, mask))
        wide = (rewards.double(), values.double(), mask)
        self.truth = [tensor.to(device) for tensor in fastpref.reference.gae(*wide, gamma=GAMMA, lam=LAM)]
        eager = self._errors(lambda *given: fastpref.reference.gae(*given, gamma=GAMMA, lam=LAM))
        pairs = zip(eager, self.truth, strict=True)
        self.limits = [2 * off + ulps(truth, torch.float32) for off, truth in pairs]

    def _errors(self, function: Callable[..., Any]) -> list[float]:
        mask = self.given[2]
        pairs = zip(function(*self.given), self.truth, strict=True)
        return [(found.double() - truth).masked_fill(~mask, 0).abs().max().item() for found, truth in pairs]

    def check(self, entry: Entry, function: Callable[..., Any]) -> tuple[Row, list[tuple[float, float]]]:
        errors = self._errors(function)
        return {"error": max(errors)}, list(zip(errors, self.limits, strict=True))

    def clear(self) -> None:
        """Do nothing: no gradient is made."""

    def release(self) -> None:
        self.truth = []

    def cases(self, entry: Entry, function: Callable[..., Any]) -> dict[str, Case]:
        return {FORWARD: Case(lambda: function(*self.given))}

    def floors(self) -> dict[str, Floor]:
        """Return two element-wise passes that read rewards and values and write as much as the results."""
        rewards, values, _ = self.given
        return {BYTES: Floor(Case(lambda: (rewards + values, rewards - values)), self.work("", FORWARD)[0])}

    def work(self, name: str, which: str) -> tuple[float, float, str]:
        """Count a read of rewards, values and mask, a write of advantages and returns, and five operations a token."""
        rewards = self.given[0]
        return rewards.numel() * (4 * 4 + 1) / 1e9, 5 * rewards.numel() / 1e9, BYTES

    def made(self, entry: Entry) -> float:
        return 2 * self.given[0].nbytes / MIB


def first_against_rest(logps: Tensor) -> Tensor:
    """Return a loss (G,) of log-probs (G, K) that prefers the first answer of a group to the mean of the others."""
    return -F.logsigmoid(BETA * (logps[:, 0] - logps[:, 1:].mean(-1)))


class GroupsProblem(LossProblem):
    """`linear_preference_loss` from hidden states on B groups of K answers of T tokens."""

    def __init__(self, axes: dict[str, Any], device: str) -> None:
        B, T, V, H, K = (axes[name] for name in "BTVHK")
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(B * K, T, H, generator=generator)
        weight = torch.randn(V, H, generator=generator) * 3 / H**0.5
        self.labels = torch.randint(V, (B * K, T), generator=generator).to(device)
        self.options = {"loss_fn": first_against_rest, "group_size": K, "shift": False}
        self.leaves = _leaves([hidden.to(device), weight.to(device)])
        self._answer(fastpref.reference.linear_preference_loss)
        # Eager PyTorch may be right by luck in a single loss, so allow the effect of rounding a sum to float32 as well.
        inputs = (self.leaves[0], self.leaves[1], self.labels)
        sums = fastpref.reference.linear_sequence_logprobs(*inputs, shift=False).abs().max().item()
        self.limits = [limit + 2 * BETA * ulp(torch.float32, sums) for limit in self.limits]

    def _step(self, function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
        return super()._step(lambda hidden, weight, **options: function(hidden, weight, self.labels, **options), leaves)

    def work(self, name: str, which: str) -> tuple[float, float, str]:
        """Count a read of the operands, a write of the gradients, and three products."""
        hidden, weight = self.leaves
        return 2 * (hidden.nbytes + weight.nbytes) / 1e9, 6 * self.labels.numel() * weight.numel() / 1e9, ""

    def made(self, entry: Entry) -> float:
        return sum(leaf.nbytes for leaf in self.leaves) / MIB


def _gae_entries(ragged: bool) -> list[Entry]:
    def called(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: function(*given, gamma=GAMMA, lam=LAM)

    found = [
        Entry("fastpref", lambda: called(fastpref.gae), "fastpref"),
        Entry("Python loop over T", lambda: called(fastpref.reference.gae)),
    ]
    if ragged:
        found.append(Entry("TRL's loop", lambda: called(peers.trl_gae), "trl"))
    return found


def _loss_entries(loss: Loss) -> list[Entry]:
    return [
        Entry("fastpref", lambda: loss.function, "fastpref"),
        Entry("the formula", lambda: loss.reference),
        Entry("torch.compile of the formula", lambda: torch.compile(loss.reference), compiles=True),
    ]


def entries(options: Options, axes: dict[str, Any]) -> list[Entry]:
    """Return the entries of fastpref and the peers of one loss."""
    if axes["loss"] in MASKS:
        return _gae_entries(MASKS[axes["loss"]] == "ragged ends")
    if axes["loss"] == GROUPS:
        return [
            Entry("fastpref", lambda: fastpref.linear_preference_loss, "fastpref"),
            Entry("the formula", lambda: fastpref.reference.linear_preference_loss),
        ]
    found = _loss_entries(next(loss for loss in TABLE if loss.name == axes["loss"]))
    return found if axes.get("sweep", "") == "" and axes["loss"] in COMPILED else found[:2]


def problem(axes: dict[str, Any], device: str) -> LossProblem | GAEProblem:
    """Return the inputs of one loss and its float64 answer."""
    kind = GAEProblem if axes["loss"] in MASKS else GroupsProblem if axes["loss"] == GROUPS else LossProblem
    return kind(axes, device)


def measure(axes: dict[str, Any], device: str, options: Options, say: Callable[..., None]) -> Rows:
    """Measure one loss and return its rows."""
    return harness.measured(problem(axes, device), entries(options, axes), device, options, say)


# The losses that are also measured compiled, one of pairs and one of rankings: each compilation takes seconds.
COMPILED = ("dpo_loss:sigmoid", "ranking_loss")
BASE = {"loss": "dpo_loss:sigmoid", "dtype": "fp32", "B": 512}
AXES = ("loss", "dtype", "B", "T", "K")


def points(preset: str, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (allocator, axes) of a preset."""
    gae = {"loss": "gae", "dtype": "fp32", "B": 512, "T": 2048}
    if preset == "smoke":
        yield "default", {**gae, "B": 4, "T": 32}
        yield "default", {**BASE, "loss": "ranking_loss", "B": 4}
        return
    yield "default", gae
    yield "default", {**gae, "loss": "gae with holes"}
    if device == "cpu":
        yield "THP", gae
    for loss in TABLE:
        yield "default", {**BASE, "loss": loss.name}
    for T in (40, 128, 400, 1280, 4096):
        yield "default", {**gae, "B": 1024, "T": T, "sweep": "T"}
    for name in ("ranking_loss", "plackett_luce_loss"):
        for K in (2, 4, 8, 16, 32, 64):  # answers of one prompt
            yield "default", {**BASE, "loss": name, "B": 1024, "K": K, "sweep": "K"}
    for K in (2, 8, 32, 96, 200):
        yield "default", {**BASE, "loss": GROUPS, "B": 2, "T": 8, "V": 4096, "H": 128, "K": K, "sweep": "K"}

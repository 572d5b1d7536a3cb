"""Time whole steps of a user: losses and log-probs from hidden states, and losses of (B,) tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastpref
from benchmarks.sweep.case import Case, Trial, furthest, normal
from benchmarks.sweep.tiles import captured
from fastpref.losses import TABLE

SEQUENCES, TOKENS, PAIRS = 8, 1024, 256
TOKENS_JUDGED = 3  # tokens whose gradient is compared with float64
WHOLE = "forward + backward"
# Sizes on a CPU: enough for two tiles.
SMALL_VOCABULARY, SMALL_FEATURES, SMALL_TOKENS = 8192, 64, 3


def _dpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True).loss


def _logprobs(mode: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastpref.linear_token_logprobs(hidden, weight, labels, mode=mode).sum()


# The function of each step, and how often N·V·H its products take in flops.
STEPS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "linear_dpo_loss": (_dpo, 6),
    "save": (functools.partial(_logprobs, "save"), 6),
    "recompute": (functools.partial(_logprobs, "recompute"), 8),
}


def _step(name: str, V: int, H: int, device: str, rows: int) -> Trial:
    function, products = STEPS[name]
    tokens = TOKENS
    if device == "cpu":
        V, H, tokens = min(V, SMALL_VOCABULARY), min(H, SMALL_FEATURES), SMALL_TOKENS
    hidden = normal(device, SEQUENCES, tokens + 1, H, dtype=torch.bfloat16).requires_grad_()
    weight = normal(device, V, H, dtype=torch.bfloat16, scale=3 / H**0.5).requires_grad_()
    labels = torch.randint(V, (SEQUENCES, tokens + 1), device=device)

    def run() -> Tensor:
        hidden.grad = weight.grad = None
        value = function(hidden, weight, labels)
        value.backward()
        return value.detach()

    def error() -> float:
        """Return the relative error of the value; raise where hidden's gradient is wrong or a gradient not finite."""
        found = run()
        assert hidden.grad is not None
        assert weight.grad is not None
        with torch.no_grad():
            rows = zip(hidden, labels, strict=True)
            logps = torch.stack([_float64_logps(x[:-1], weight, y[1:]).sum() for x, y in rows])
        leaf = logps.requires_grad_()
        truth = _dpo_of(*leaf.chunk(2)) if name == "linear_dpo_loss" else leaf.sum()
        (upstream,) = torch.autograd.grad(truth, leaf)
        with torch.no_grad():
            # Of the first rows of the first sequence.
            z = hidden[0, :TOKENS_JUDGED].double() @ weight.double().T
            by_z = -z.softmax(-1)
            by_z.scatter_add_(-1, labels[0, 1 : len(z) + 1, None], torch.ones_like(z[:, :1]))
            d_hidden = upstream[0] * (by_z @ weight.double())
            off = furthest(hidden.grad[0, : len(z)], d_hidden) / d_hidden.abs().max().item()
        if not off < 2e-2:
            raise ValueError(f"hidden's gradient is off by {off:.1e} of its largest value")
        whole = hidden.grad.isfinite().all() & weight.grad.isfinite().all()
        return furthest(found, truth.detach()) / max(truth.abs().item(), 1.0) if whole else float("nan")

    return Trial(run, error, 1e-4, tflop=products * SEQUENCES * tokens * V * H / 1e12, whole=True)


def _float64_logps(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    found = []
    for rows, y in zip(x.split(64), labels.split(64), strict=True):
        z = rows.double() @ weight.double().T
        found.append(z.gather(-1, y[:, None])[:, 0] - z.logsumexp(-1))
    return torch.cat(found)


def _dpo_of(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def _loss(index: int, graph: bool, device: str, rows: int) -> Trial:
    loss = TABLE[index]
    tensors, options = loss.example(torch.Generator().manual_seed(0), PAIRS)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)

    given = [moved(tensor).requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    keywords = {**loss.options, **{name: moved(value) for name, value in options.items()}}
    leaves = [tensor for tensor in given if tensor.requires_grad]
    one = torch.ones((), device=device)

    def value_of(result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else result.loss

    def run() -> Tensor:
        value = value_of(loss.function(*given, **keywords))
        torch.autograd.grad(value, leaves, one, allow_unused=True)
        return value.detach()

    def error() -> float:
        truth = value_of(loss.reference(*(t.double() if t.is_floating_point() else t for t in given), **keywords))
        return furthest(run(), truth.detach()) / max(truth.abs().item(), 1.0)

    return Trial(captured(run) if graph else run, error, 1e-5, whole=not graph)


def cases(small: bool) -> Iterator[Case]:
    """Yield the steps from hidden states, then those of losses; `small` ones for a machine without a GPU."""
    for V, H in ((SMALL_VOCABULARY, SMALL_FEATURES),) if small else ((128256, 4096), (262144, 1152)):
        for name in STEPS:
            R, make = SEQUENCES * (SMALL_TOKENS if small else TOKENS), functools.partial(_step, name, V, H)
            yield Case("step", name, "bfloat16", R, V, H, WHOLE, make, True)
    for index, loss in list(enumerate(TABLE))[: 3 if small else None]:
        for graph in (False, True):
            config, make = "graph replay" if graph else WHOLE, functools.partial(_loss, index, graph)
            shape = ("float32", PAIRS, 0, 0)
            yield Case(
                "losses", loss.name, *shape, config, make, not graph, compiles=not graph, cuda=graph, graph=graph
            )

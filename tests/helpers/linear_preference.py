"""Operands of the losses from hidden states, and the losses of the log-probs of the product."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fastpref import reference

PAIRS, TIME, FEATURES, VOCABULARY = 3, 7, 5, 23
# By how much a value may miss the truth, in parts of its largest magnitude, or of 1.
RELATIVE = {torch.float32: 2e-5, torch.float64: 1e-12}
Operands = dict[str, Tensor]


def make(sequences: int = 2 * PAIRS, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Operands, Tensor]:
    """Return hidden states, weight and bias, and labels with unequal numbers of scored tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    operands = {
        "hidden": normal(sequences, TIME, FEATURES),
        "weight": normal(VOCABULARY, FEATURES),
        "bias": normal(VOCABULARY),
    }
    labels = torch.randint(VOCABULARY, (sequences, TIME), generator=generator)
    for sequence in range(sequences):
        labels[sequence, : 1 + sequence % 3] = -100
        labels[sequence, TIME - sequence % 2 :] = -100
    return operands, labels


def pack(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sequences without the padding at their ends, and their boundaries."""
    ends = [TIME - sequence % 2 for sequence in range(hidden.shape[0])]
    kept = torch.cat([torch.arange(TIME) < end for end in ends])
    bounds = torch.tensor([0, *itertools.accumulate(ends)])
    return hidden.flatten(0, 1)[kept], labels.flatten()[kept], bounds


def leaves_of(operands: Operands, dtype: torch.dtype | None = None) -> Operands:
    return {name: value.to(dtype or value.dtype, copy=True).requires_grad_() for name, value in operands.items()}


def composed(operands: Operands, labels: Tensor, average_logps: bool, options: dict[str, Any]) -> Tensor:
    """Return float64 sequence log-probs of the product's logits."""
    z = operands["hidden"].double() @ operands["weight"].double().T + operands["bias"].double()
    kept = {name: options[name] for name in ("cu_seqlens", "ld_alpha", "shared_lengths", "shift") if name in options}
    return reference.sequence_logprobs(z, labels, reduction="mean" if average_logps else "sum", **kept)


def incoming(loss: Tensor) -> Tensor:
    return torch.linspace(0.7, 2.1, loss.numel(), dtype=torch.float64).to(loss.dtype).view(loss.shape)


def assert_near(found: Tensor, truth: Tensor, dtype: torch.dtype, name: str) -> None:
    assert found.shape == truth.shape, name
    assert found.dtype == dtype, name
    size = truth.abs().max().item() if name.startswith("d") else max(1.0, truth.abs().max().item())
    error = (found.detach().double() - truth.detach()).abs().max().item()
    assert error <= RELATIVE[dtype] * size, f"{name}: {error:.2e} of {size:.2e}"


def gradients(leaves: Operands) -> dict[str, Tensor]:
    assert all(leaf.grad is not None for leaf in leaves.values())
    return {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def plackett_luce(logps: Tensor) -> Tensor:
    """(G, K) best first -> (G,): −Σ_i [a_i − logΣ_{j≥i} exp a_j]."""
    a = 0.5 * logps
    rest = [a[:, i:].logsumexp(-1) for i in range(a.shape[1])]
    return -(a - torch.stack(rest, -1)).sum(-1)

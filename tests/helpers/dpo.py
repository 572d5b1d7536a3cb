"""Pairs of log-probs for `dpo_loss`, the options of every loss type, and the check of a call against the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import dpo_loss
from tests.oracles.precision import Number, Numbers, mp, numbers
from tests.oracles.preference import LOSS_TYPES, dpo_losses, dpo_losses_and_gradients

TYPES = tuple(LOSS_TYPES)
FREE = tuple(kind for kind, row in LOSS_TYPES.items() if not row.reference)
REFERENCED = tuple(kind for kind in TYPES if kind not in FREE)
NORMALIZED = tuple(kind for kind, row in LOSS_TYPES.items() if row.normalized)
# The types of `DPOConfig.loss_type` in TRL.
TRL_LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
SORTED = ("aot", "aot_unpaired")
BUT_SFT = tuple(kind for kind in TYPES if kind != "sft")
LOG2, LOG3 = math.log(2), math.log(3)
every_type = pytest.mark.parametrize("kind", TYPES)


def taking(option: str) -> tuple[str, ...]:
    """Return the loss types that an option enters."""
    return tuple(kind for kind, row in LOSS_TYPES.items() if option in row.takes)


def required(kind: str) -> dict[str, Any]:
    """Return the options without which the type is refused."""
    return dict(LOSS_TYPES[kind].needs)


def example(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Return w, l, rw, rl and the lengths: mean log-probs between -3 and -0.1, references within a few nats of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 20, (size,), generator=generator) for _ in range(2)]
    policy = [-(0.1 + 2.9 * torch.rand(size, generator=generator, dtype=torch.float64)) * n for n in lengths]
    reference = [x + 2 * torch.randn(size, generator=generator, dtype=torch.float64) for x in policy]
    return [x.to(dtype) for x in (*policy, *reference)], lengths


def choices(kind: str) -> list[dict[str, Any]]:
    """Return every option that the type takes, one at a time, and a few together."""
    takes = LOSS_TYPES[kind].takes
    found: list[dict[str, Any]] = [{}, {"beta": 0.7}]
    margin = torch.tensor([0.25, -1.0, 0.0, 2.5, 0.75], dtype=torch.float64)
    values: dict[str, list[dict[str, Any]]] = {
        "weights": [{"weights": torch.tensor([0.5, 2.0, 0.0, 1.25, 3.0], dtype=torch.float64)}],
        "label_smoothing": [{"label_smoothing": e} for e in (0.3, 1e-12)],
        "margin": [{"margin": margin}, {"margin": margin, "beta": 1.5}],
        "f_divergence": [
            *({"f_divergence": name} for name in ("forward_kl", "js", "alpha")),
            # At α = −0.5 the two slopes of apo_down cancel here, and their sum has few digits.
            *({"f_divergence": "alpha", "f_alpha": a} for a in (-0.5, 1.0, 2.0) if (kind, a) != ("apo_down", -0.5)),
        ],
        "length_normalize": [{"length_normalize": True, "beta": 2.0}],
        "delta": [{"delta": 0.75}, {"delta": -1.5}],
        "gamma": [{"gamma": 0.0}, {"gamma": 1.75, "beta": 2.5, "margin": margin}],
        "discopop_tau": [{"discopop_tau": 1.0}, {"discopop_tau": 3.0, "beta": 0.5}],
    }
    for option, given in values.items():
        found += given if option in takes else []
    if {"length_normalize", "f_divergence"} <= takes:
        found.append({"length_normalize": True, "f_divergence": "js", "beta": 2.0})
    if kind in REFERENCED:
        found.append({"reference_free": True, "beta": 0.02})
    if kind == "sigmoid":
        found.append({"label_smoothing": 0.2, "margin": margin, "f_divergence": "alpha", "f_alpha": 0.25})
        found += [{"label_smoothing": 0.5}, {"label_smoothing": 1.0}]
    return [{**required(kind), **options} for options in found]


def allowed(right: Number, moved: Number, eps: float, floor: float, ulps: int) -> Number:
    """Return how far from `right` a result may be: 8 times as far as `moved` is, and `ulps` of at least `floor`."""
    return 8 * abs(moved - right) + ulps * eps * max(abs(right), floor)


def check(
    kind: str,
    columns: Sequence[Tensor],
    lengths: Sequence[Tensor],
    reduction: str = "none",
    *,
    gradient: bool = True,
    ulps: int = 8,
    **options: Any,
) -> None:
    """Hold `dpo_loss` against the oracle: each loss, the gradient of each log-prob, and the rewards.

    A result may miss the oracle's by eight times what one rounding of every input does to it, and by eight ulp.
    """
    leaves = [c.detach().clone().requires_grad_() for c in columns]
    size, dtype = len(leaves[0]), leaves[0].dtype
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if kind in (*NORMALIZED, "sft") or options.get("length_normalize") or options.get("sft_weight"):
        options = {**options, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    result = dpo_loss(*leaves, loss_type=kind, reduction=reduction, **options)
    options = {name: value for name, value in options.items() if not name.endswith("_lengths")}
    options = {name: numbers(v) if isinstance(v, Tensor) else v for name, v in options.items()}

    share = mp.mpf(1) / size if reduction == "mean" and size else mp.mpf(1)
    steps = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    upstream = numbers(steps) if reduction == "none" else [share] * size
    exact = [numbers(c) for c in leaves]
    n = [side.tolist() for side in lengths]

    def answers(rounding: float) -> tuple[Numbers, list[Numbers]]:
        """Return the truth where every number is moved by a rounding, β too: h as far as it goes."""
        signs = [rounding * s for s in (1, -1, -1, 1)]
        moved = [[x + s * abs(x) for x in column] for s, column in zip(signs, exact, strict=True)]
        scalars = {**options, "beta": mp.mpf(options.get("beta", 0.1)) * (1 + rounding)}
        if gradient:
            values, slopes = dpo_losses_and_gradients(kind, moved, n, upstream, scalars)
        else:
            values, slopes = dpo_losses(kind, moved, n, **scalars), []
        return (values if reduction == "none" else [sum(x * share for x in values)]), slopes

    right, moved = answers(0.0), answers(eps)
    got = result.loss.detach().double().reshape(-1).tolist()
    assert len(got) == len(right[0])
    assert result.loss.shape == ((size,) if reduction == "none" else ())
    for i, value in enumerate(right[0]):
        limit = allowed(value, moved[0][i], eps, 1.0, ulps)
        assert abs(got[i] - value) <= limit, f"loss[{i}]: {got[i]!r}, wanted {mp.nstr(value, 17)}"

    beta = options.get("beta", 0.1)
    if gradient and size:
        result.loss.backward(steps.to(result.loss.dtype) if reduction == "none" else None)
        # Half a bf16 or fp16 ulp where the gradient is rounded to the leaf's own dtype.
        rounded = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0
        for name, c in (("w", 0), ("l", 1), ("rw", 2), ("rl", 3)):
            leaf = leaves[c]
            slopes = [0.0] * size if leaf.grad is None else leaf.grad.double().tolist()
            for i, value in enumerate(right[1][c]):
                limit = allowed(value, moved[1][c][i], eps, beta, ulps) + rounded * abs(value)
                assert abs(slopes[i] - value) <= limit, f"d{name}[{i}]: {slopes[i]!r}, wanted {mp.nstr(value, 17)}"

    zeros = kind in FREE or options.get("reference_free")
    for reward, a, b in ((result.chosen_rewards, 0, 2), (result.rejected_rewards, 1, 3)):
        assert reward.shape == (size,)
        assert not reward.requires_grad
        for i, value in enumerate(reward.double().tolist()):
            x, y = exact[a][i], mp.mpf(0) if zeros else exact[b][i]
            assert abs(value - beta * (x - y)) <= 4 * eps * beta * (abs(x) + abs(y))

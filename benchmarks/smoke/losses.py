"""List the cases of losses, each with its options and in one program and several, and of advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import fastpref
from benchmarks.smoke.case import SmokeCase
from fastpref import losses, reference
from fastpref.testing.case import DTYPES, Arguments, Case, normal
from fastpref.testing.loss_cases import loss_case

FEW = 37
# Options that the examples leave out, by their names in `Loss.takes`.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "label_smoothing": [{"label_smoothing": 0.1}],
    "length_normalize": [{"length_normalize": True}],
    "margin": [{"margin": 0.7}],
    "f_divergence": [
        {"f_divergence": "forward_kl"},
        {"f_divergence": "js"},
        {"f_divergence": "alpha", "f_alpha": 0.5},
    ],
    "delta": [{"delta": 0.4}],
    "gamma": [{"gamma": 1.5}],
    "discopop_tau": [{"discopop_tau": 0.5}],
}
# Elements that two programs share at the least: a program holds 1024 pairs, 256 prompts of 4 or 16 of 8², and `aot` is
# sorted by programs of 64, each in as many steps as there are pairs.
SEVERAL = {"best_of_k_loss": 300, "ranking_loss": 40, "plackett_luce_loss": 40, "dpo_loss:aot": 130}
SEVERAL["dpo_loss:aot_unpaired"] = SEVERAL["dpo_loss:aot"]
PAIRS = 1061


def losses_cases(device: str) -> Iterator[SmokeCase]:
    """Yield the cases; a GPU is given a longer sequence than the interpreter."""
    operators = set()
    for loss in losses.TABLE:
        several = SEVERAL.get(loss.name, PAIRS)
        first = loss.operator not in operators or loss.name == "dpo_loss:aot"
        operators.add(loss.operator)
        for reduction in ("mean", "none"):
            call = loss_case(loss, reduction, several)
            yield SmokeCase(call=call, dtype=torch.float32, tier=0 if first and reduction == "mean" else 1)
        for dtype in DTYPES:
            call = loss_case(loss, "sum", FEW)
            yield SmokeCase(call=call, dtype=dtype, tier=2)
        for name in loss.takes:
            for options in OPTIONS.get(name, []):
                # In float32, powers of large log-ratios would test the exponential instead of the loss.
                dtype = torch.float64 if options.get("f_divergence") == "alpha" else torch.float32
                yield SmokeCase(call=_with(loss_case(loss, "mean", FEW), **options), dtype=dtype, tier=2)
    sigmoid = loss_case(next(loss for loss in losses.TABLE if loss.name == "dpo_loss:sigmoid"), "mean", PAIRS)
    for how in ("token", "sequence"):
        yield SmokeCase(call=_with(sigmoid, sft_weight=0.7, sft_reduction=how), dtype=torch.float32, tier=2)
    yield SmokeCase(call=_with(sigmoid, weights=torch.linspace(0.1, 2.0, PAIRS)), dtype=torch.float32, tier=2)
    several_types = _with(sigmoid, loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0))
    yield SmokeCase(call=several_types, dtype=torch.float32, tier=2)
    yield from _advantages(1100 if device == "cpu" else 2600)


def _with(call: Case, **options: Any) -> Case:
    """Return the call with more options, which are added to its name."""

    def draw(generator: torch.Generator) -> Arguments:
        leaves, constants = call.draw(generator)
        return leaves, {**constants, **options}

    told = (
        name if isinstance(value, torch.Tensor) else f"{name}={'+'.join(value) if name == 'loss_type' else value}"
        for name, value in options.items()
        if name != "loss_weights"
    )
    return replace(call, name=f"{call.name}/{','.join(told)}", draw=draw)


def _advantages(tokens: int) -> Iterator[SmokeCase]:
    """Yield advantages over several blocks of tokens, with holes and without."""

    def call(name: str, share: float) -> Case:
        def draw(generator: torch.Generator) -> Arguments:
            mask = torch.rand(3, tokens, generator=generator) < share
            named = {"rewards": normal(generator, 3, tokens), "values": normal(generator, 3, tokens)}
            return {}, {**named, "mask": mask, "gamma": 0.99, "lam": 0.95}

        return Case(name=name, function=fastpref.gae, definition=reference.gae, draw=draw)

    for dtype in DTYPES:
        yield SmokeCase(call=call("gae/holes", 0.7), dtype=dtype, tier=0 if dtype == torch.float32 else 2)
    yield SmokeCase(call=call("gae/dense", 2.0), dtype=torch.float32)

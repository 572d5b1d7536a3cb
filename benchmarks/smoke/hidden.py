"""List the cases of log-probs and losses from hidden states: both modes, tiles of columns, a filter, one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.smoke.case import SmokeCase
from fastpref import reference
from fastpref._core.results import LINEAR_STATISTICS, STATISTICS
from fastpref.reference.linear_logprobs import linear_logits
from fastpref.testing.case import TRANSFORM, Arguments, Case, boundaries
from fastpref.testing.linear_cases import BETA, in_order, linear_case
from fastpref_kernels.contract import COLUMNS
from fastpref_kernels.triton import launches

# A whole tile and a narrow one; three whole tiles and a narrow one.
TWO_TILES, FOUR_TILES = COLUMNS + 37, 3 * COLUMNS + 37
FILTER = 1e-6
NARROW = (torch.bfloat16, torch.float32)
EVERY = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
LAUNCH = launches.ProductLaunch(launches.Blocks(64, 64, 32, 2, 2, 4), width=32, described=True)


def hidden_cases(device: str) -> Iterator[SmokeCase]:
    """Yield the cases; a GPU is given more rows than the interpreter."""
    rows = (2, 4) if device == "cpu" else (4, 65)
    tokens = rows[0] * rows[1]

    def cases(
        name: str,
        *,
        dtypes: tuple[torch.dtype, ...] = NARROW,
        tier: int = 1,
        vocabulary: int = TWO_TILES,
        change: Callable[[Case], Case] = lambda call: call,
        not_interpreted: str | None = None,
        **options: Any,
    ) -> Iterator[SmokeCase]:
        call = change(linear_case(name, options.pop("rows", rows), vocabulary, **options))
        for dtype in dtypes:
            if dtype in call.dtypes:
                skipped = not_interpreted if dtype == torch.bfloat16 else None
                yield SmokeCase(call=call, dtype=dtype, tier=tier, not_interpreted=skipped)

    reason = "the interpreter cannot multiply bfloat16"
    for mode in ("save", "recompute"):
        token, sequence = f"linear_token_logprobs/{mode}", f"linear_sequence_logprobs/{mode}"
        yield from cases(f"{token}-bias", mode=mode, tier=0)
        yield from cases(token, mode=mode, biased=False, dtypes=EVERY)
        yield from cases(f"{token}-four-tiles", mode=mode, vocabulary=FOUR_TILES)
        yield from cases(f"{token}-transformed", mode=mode, dtypes=EVERY, **TRANSFORM)
        yield from cases(f"{token}-statistics", mode=mode, stats=LINEAR_STATISTICS, chunk_rows=5)
        yield from cases(f"{token}-label-far-below", mode=mode, peak=130.0)
        filtered: dict[str, Any] = {"stats": ("dropped_mass",), "filter_eps": FILTER, "change": _filtered}
        yield from cases(f"{token}-filter", mode=mode, tier=0, not_interpreted=reason, **filtered)
        yield from cases(f"{token}-told-its-rows", mode=mode, scored_rows=tokens)
        yield from cases(f"{sequence}-weighted", mode=mode, ld_alpha=0.3, shift=False)
        packed: dict[str, Any] = {"rows": (tokens,), "cu_seqlens": boundaries(tokens)}
        yield from cases(f"{sequence}-packed", mode=mode, reduction="mean", **packed)
        fused: dict[str, Any] = {"dtypes": EVERY[:3], "change": _fused, "not_interpreted": reason}
        yield from cases(f"{token}-fused-product", mode=mode, **fused)

    # Four pairs, of which a chunk holds two or three.
    of_pairs, chunk = (8, 3 if device == "cpu" else 33), 9 if device == "cpu" else 99
    pairs: dict[str, Any] = {"rows": of_pairs, "references": True, "beta": BETA}
    yield from cases("linear_dpo_loss/one-chunk", **pairs, dtypes=EVERY, tier=0)
    yield from cases("linear_dpo_loss/several-chunks", **pairs, chunk_rows=chunk, stats=STATISTICS)
    options = {"chunk_rows": chunk, "biased": False, "average_logps": True, "loss_type": "ipo", **TRANSFORM}
    yield from cases("linear_dpo_loss/transformed", **pairs, **options)
    told = [of_pairs[1]] * of_pairs[0]
    yield from cases("linear_dpo_loss/told-its-rows", **pairs, chunk_rows=chunk, scored_rows=told)
    yield from cases("linear_dpo_loss/recompute", **pairs, mode="recompute", chunk_rows=chunk, label_smoothing=0.1)
    yield from cases("linear_dpo_loss/none", **pairs, reduction="none")
    groups: dict[str, Any] = {"rows": of_pairs, "group_size": 2, "loss_fn": in_order}
    yield from cases("linear_preference_loss/one-chunk", **groups)
    yield from cases("linear_preference_loss/several-chunks", **groups, chunk_rows=chunk)

    yield from cases("linear_token_logprobs/one-rank", ranked=True, stats=STATISTICS)
    yield from cases("linear_dpo_loss/one-rank", ranked=True, **pairs, chunk_rows=chunk)


def _fused(call: Case) -> Case:
    """Return the call on the kernel that folds its own product, which no shape takes by itself."""

    def within(device: torch.device) -> AbstractContextManager[Any]:
        return mock.patch.object(launches, "product_launch", return_value=LAUNCH)

    return replace(call, within=within)


def _filtered(call: Case) -> Case:
    """Return the call with a first tile that has so little mass that only the rows with their label in it keep it."""

    def draw(generator: torch.Generator) -> Arguments:
        leaves, constants = call.draw(generator)
        leaves["bias"][:COLUMNS] -= 30.0
        leaves["bias"][COLUMNS:] += 5.0
        return leaves, constants

    return replace(call, draw=draw, definition=_linear_token_logprobs)


def _linear_token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, **options: Any) -> Any:
    """Compute the definition's results, and the mass that a filter drops."""
    found = reference.linear_token_logprobs(hidden, weight, labels, bias, **options)
    with torch.no_grad():
        targets = labels[..., 1:]
        shares = linear_logits(hidden[..., :-1, :], weight, bias, targets != -100).softmax(-1).split(COLUMNS, -1)
        dropped = torch.zeros_like(found.dropped_mass)
        for i, tile in enumerate(shares):
            mass = tile.sum(-1)
            dropped += mass.masked_fill((mass >= FILTER) | (targets // COLUMNS == i), 0.0)
    return found._replace(dropped_mass=dropped.masked_fill(targets == -100, 0.0))

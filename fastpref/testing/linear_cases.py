"""Cases of log-probs and losses from hidden states: both modes, several chunks, and a process group of one rank."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref._core.results import LINEAR_STATISTICS, STATISTICS
from fastpref.testing.case import (
    DTYPES,
    FEW_ROWS,
    LARGE_VOCABULARY,
    ROWS,
    TRANSFORM,
    VOCABULARY,
    Arguments,
    Case,
    Layout,
    as_it_is,
    boundaries,
    draw_labels,
    normal,
    transposed_rows,
)
from fastpref.testing.evaluate import GRADIENT, evaluate

FEATURES, FEWER_FEATURES = 48, 16
# The identity matrix of a larger vocabulary takes too much memory.
SUMMED_VOCABULARY = 1 << 13
BETA = 0.1
PAIRS, ANSWERS = 4, 3
# At least the scored rows of one group, and fewer than those of all groups, so that the loss takes several chunks.
CHUNK = 3 * ROWS[1]


def linear_cases() -> Iterator[Case]:
    """Yield the cases of the two log-prob functions and the two losses."""
    tokens = math.prod(ROWS)
    packed: dict[str, Any] = {"rows": (tokens,), "cu_seqlens": boundaries(tokens)}
    for mode in ("save", "recompute"):
        yield linear_case(f"linear_token_logprobs/{mode}", mode=mode)
        yield linear_case(f"linear_token_logprobs/{mode}, no bias, transformed", biased=False, mode=mode, **TRANSFORM)
        yield linear_case(f"linear_token_logprobs/{mode}, statistics", mode=mode, stats=LINEAR_STATISTICS, chunk_rows=7)
        yield linear_case(f"linear_token_logprobs/{mode}, large vocabulary", FEW_ROWS, LARGE_VOCABULARY, mode=mode)
        yield linear_case(f"linear_token_logprobs/{mode}, strided", biased=False, layout=transposed_rows, mode=mode)
        yield linear_case(f"linear_token_logprobs/{mode}, one feature", features=1, mode=mode)
        yield linear_case(f"linear_token_logprobs/{mode}, label far below", peak=130.0, mode=mode)
        yield linear_case(f"linear_sequence_logprobs/{mode}, packed", **packed, mode=mode, reduction="mean")
        yield linear_case(f"linear_sequence_logprobs/{mode}, LD-DPO", mode=mode, ld_alpha=0.3, shift=False)
    if dist.is_available():
        yield linear_case("linear_token_logprobs/one rank", ranked=True, stats=STATISTICS)
    pairs: dict[str, Any] = {"rows": (2 * PAIRS, ROWS[1]), "references": True, "beta": BETA}
    yield linear_case("linear_dpo_loss/one chunk", **pairs)
    yield linear_case("linear_dpo_loss/several chunks", **pairs, chunk_rows=CHUNK)
    ipo: dict[str, Any] = {"loss_type": "ipo", "average_logps": True, "stats": STATISTICS, "biased": False, **TRANSFORM}
    yield linear_case("linear_dpo_loss/several chunks, transformed", **pairs, **ipo, chunk_rows=CHUNK)
    yield linear_case("linear_dpo_loss/recompute", **pairs, mode="recompute", chunk_rows=CHUNK, label_smoothing=0.1)
    yield linear_case("linear_dpo_loss/none", **pairs, reduction="none")
    groups: dict[str, Any] = {"rows": (ANSWERS * PAIRS, ROWS[1]), "group_size": ANSWERS, "loss_fn": in_order}
    yield linear_case("linear_preference_loss/one chunk", **groups)
    yield linear_case("linear_preference_loss/several chunks", **groups, chunk_rows=CHUNK)


def in_order(logps: Tensor) -> Tensor:
    """Return the Plackett-Luce loss of (G, K) log-probs whose answers are ordered best first."""
    ranks = torch.arange(logps.shape[1], device=logps.device).expand_as(logps)
    return reference.plackett_luce_loss(BETA * logps, ranks, reduction="none")


def linear_case(
    name: str,
    rows: tuple[int, ...] = ROWS,
    vocabulary: int = VOCABULARY,
    *,
    biased: bool = True,
    peak: float = 0.0,
    references: bool = False,
    ranked: bool = False,
    features: int | None = None,
    layout: Layout = as_it_is,
    **options: Any,
) -> Case:
    """Return a case of the function that `name` begins with.

    Args:
        name: the name of the case.
        rows: the shape of the labels.
        vocabulary: V.
        biased: whether the head has a bias.
        peak: a number added to the bias of one class.
        references: whether to pass the reference's log-probs of the chosen and the rejected answers.
        ranked: whether to pass a process group of one rank.
        features: H; the default depends on the vocabulary.
        layout: the layout of hidden, weight and bias.
        options: the other arguments of the function.
    """
    function = name.partition("/")[0]
    return Case(
        name=name,
        function=getattr(fastpref, function),
        definition=getattr(reference, function),
        draw=functools.partial(_draw, rows, vocabulary, features, biased, peak, references, ranked, options),
        layout=layout,
        summed=functools.partial(_summed, getattr(reference, function)),
        within=_one_rank if ranked else contextlib.nullcontext,
        slack=4.0,  # fastpref and float64 add up the logits in different orders
        # mode="save" does not support float16: stored exponentials overflow.
        dtypes=tuple(x for x in DTYPES if (options.get("mode"), x) != ("save", torch.float16)),
    )


@contextlib.contextmanager
def _one_rank(device: torch.device) -> Iterator[None]:
    """Run in a process group of this process alone, for the CPU and `device`."""
    if dist.is_initialized():
        yield
        return
    # A CUDA build of torch has NCCL, which cannot start on a machine without a GPU.
    others = "" if device.type == "cpu" else f",{device.type}:{dist.get_default_backend_for_device(device)}"
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(f"cpu:gloo{others}", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _draw(
    rows: tuple[int, ...],
    vocabulary: int,
    features: int | None,
    biased: bool,
    peak: float,
    references: bool,
    ranked: bool,
    options: dict[str, Any],
    generator: torch.Generator,
) -> Arguments:
    if features is None:
        features = FEATURES if vocabulary < LARGE_VOCABULARY else FEWER_FEATURES
    hidden, weight = normal(generator, *rows, features), normal(generator, vocabulary, features)
    # The logits have a standard deviation of about 3.
    leaves = {"hidden": hidden, "weight": 3 / math.sqrt(features) * weight}
    if biased:
        leaves["bias"] = normal(generator, vocabulary)
        leaves["bias"][17] += peak
    constants = {"labels": draw_labels(generator, vocabulary, *rows), **options}
    if references:
        for side in ("ref_chosen_logps", "ref_rejected_logps"):
            constants[side] = -60 + 8 * normal(generator, rows[0] // 2)
    if ranked:
        constants["process_group"] = dist.group.WORLD
    return leaves, constants


def _summed(definition: Callable[..., Any], leaves: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, float]:
    """Return the magnitude of the terms of each gradient, and of the log-probs whose difference is the loss."""
    hidden, weight = leaves["hidden"], leaves["weight"]
    if weight.shape[0] > SUMMED_VOCABULARY:
        return {}
    # Under an identity head the hidden states are the logits, so their gradient is the logits' gradient.
    logits = hidden @ weight.T + leaves.get("bias", 0.0)
    identity = torch.eye(weight.shape[0], dtype=torch.float64, device=weight.device)
    found = evaluate(definition, {"hidden": logits}, {"weight": identity, **constants})
    d_logits = found[GRADIENT + "hidden"].flatten(0, -2).abs().to(weight.device)
    rows = hidden.flatten(0, -2).abs()
    sums = {"hidden": d_logits @ weight.abs(), "weight": d_logits.T @ rows, "bias": d_logits.sum(0)}
    summed = {GRADIENT + name: value.max().item() for name, value in sums.items()}
    if "loss" in found:
        logps = max(value.abs().max().item() for name, value in found.items() if name.endswith("logps"))
        summed |= dict.fromkeys(("loss", "chosen_rewards", "rejected_rewards"), BETA * logps)
    return summed

"""Log-probs from logits: layouts, options, statistics, and rows that ask for care."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref._results import STATISTICS
from fastpref.cli.check.allowance import mean_magnitude
from fastpref.cli.check.case import (
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
)

Peak = Callable[[Tensor, Tensor], Tensor]


def logprobs_cases() -> Iterator[Case]:
    """Those of both functions."""
    tokens = math.prod(ROWS)
    yield _case("token_logprobs/plain")
    yield _case("token_logprobs/unshifted, in place", shift=False, inplace_backward=True)
    yield _case("token_logprobs/large vocabulary", FEW_ROWS, LARGE_VOCABULARY)
    yield _case("token_logprobs/statistics", stats=STATISTICS)
    yield _case("token_logprobs/transformed, in place", stats=STATISTICS, inplace_backward=True, **TRANSFORM)
    yield _case("token_logprobs/strided", transposed=True, stats=("entropy",))
    yield _case("token_logprobs/strided, in place", transposed=True, inplace_backward=True)
    for function in ("token_logprobs", "sequence_logprobs"):
        for name, peak in {"label far below": _far_above_the_label, "near certainty": _near_certain}.items():
            yield _case(f"{function}/{name}", peak=peak, shift=False)
            yield _case(f"{function}/{name}, entropy", peak=peak, shift=False, stats=("entropy",))
    yield _case("sequence_logprobs/sum")
    yield _case("sequence_logprobs/mean, in place", reduction="mean", inplace_backward=True)
    yield _case("sequence_logprobs/large vocabulary", FEW_ROWS, LARGE_VOCABULARY, stats=("log_sum_sq_probs",))
    yield _case("sequence_logprobs/LD-DPO", ld_alpha=0.3)
    packed: dict[str, Any] = {"rows": (tokens,), "cu_seqlens": boundaries(tokens)}
    yield _case("sequence_logprobs/packed", **packed, stats=STATISTICS)
    yield _case("sequence_logprobs/packed, unshifted", **packed, shift=False, reduction="mean", **TRANSFORM)
    shared = torch.tensor([2, 0, tokens, 4])
    yield _case(
        "sequence_logprobs/packed, LD-DPO, in place", **packed, ld_alpha=0.0, shared_lengths=shared,
        inplace_backward=True,
    )  # fmt: skip


def _case(
    name: str, rows: tuple[int, ...] = ROWS, vocabulary: int = VOCABULARY, peak: Peak | None = None,
    transposed: bool = False, **options: Any,
) -> Case:  # fmt: skip
    function = name.partition("/")[0]
    # What a gradient is written over must be the result of another operation, as a model's logits are.
    own = torch.clone if options.get("inplace_backward") else as_it_is

    def layout(leaf: Tensor) -> Tensor:
        return own(leaf).transpose(0, 1) if transposed else own(leaf)

    return Case(
        name=name,
        function=getattr(fastpref, function),
        definition=getattr(reference, function),
        draw=functools.partial(_draw, rows, vocabulary, peak, transposed, options),
        layout=layout,
        # Float64's own log-softmax loses half a ulp of the logits here, and is no truth.
        dtypes=DTYPES[:3] if peak is _near_certain else DTYPES,
        summed=functools.partial(_summed, layout),
    )


def _draw(
    rows: tuple[int, ...], vocabulary: int, peak: Peak | None, transposed: bool, options: dict[str, Any],
    generator: torch.Generator,
) -> Arguments:  # fmt: skip
    logits, labels = 3 * normal(generator, *rows, vocabulary), draw_labels(generator, vocabulary, *rows)
    if peak is not None:
        logits = peak(logits, labels)
    if transposed:
        logits = logits.transpose(0, 1).contiguous()
    return {"logits": logits}, {"labels": labels, **options}


def _far_above_the_label(logits: Tensor, labels: Tensor) -> Tensor:
    logits[..., 17] = 130.0
    return logits.scatter(-1, labels.clamp(min=0)[..., None], 1.0)


def _near_certain(logits: Tensor, labels: Tensor) -> Tensor:
    # Some 20 nats above all others together: a probability of 1 - 1e-9.
    return logits.scatter(-1, labels.clamp(min=0)[..., None], 32.0)


def _summed(layout: Layout, leaves: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, float]:
    transform = {name: constants[name] for name in TRANSFORM if name in constants}
    return {"mean_logits": mean_magnitude(layout(leaves["logits"]), **transform)}

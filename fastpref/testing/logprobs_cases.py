"""Cases of log-probs from logits: layouts, options, statistics, and rows with extreme logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref._core.results import STATISTICS
from fastpref.testing.accuracy import mean_magnitude
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

Peak = Callable[[Tensor, Tensor], Tensor]


def logprobs_cases() -> Iterator[Case]:
    """Yield the cases of `token_logprobs` and `sequence_logprobs`."""
    tokens = math.prod(ROWS)
    yield logprobs_case("token_logprobs/plain")
    yield logprobs_case("token_logprobs/unshifted, in place", shift=False, inplace_backward=True)
    yield logprobs_case("token_logprobs/large vocabulary", FEW_ROWS, LARGE_VOCABULARY)
    yield logprobs_case("token_logprobs/statistics", stats=STATISTICS)
    yield logprobs_case("token_logprobs/transformed, in place", stats=STATISTICS, inplace_backward=True, **TRANSFORM)
    yield logprobs_case("token_logprobs/strided", layout=transposed_rows, stats=("entropy",))
    yield logprobs_case("token_logprobs/strided, in place", layout=transposed_rows, inplace_backward=True)
    for function in ("token_logprobs", "sequence_logprobs"):
        for name, peak in {"label far below": far_above_the_label, "near certainty": near_certain}.items():
            yield logprobs_case(f"{function}/{name}", peak=peak, shift=False)
            yield logprobs_case(f"{function}/{name}, entropy", peak=peak, shift=False, stats=("entropy",))
    yield logprobs_case("sequence_logprobs/sum")
    yield logprobs_case("sequence_logprobs/mean, in place", reduction="mean", inplace_backward=True)
    yield logprobs_case("sequence_logprobs/large vocabulary", FEW_ROWS, LARGE_VOCABULARY, stats=("log_sum_sq_probs",))
    yield logprobs_case("sequence_logprobs/LD-DPO", ld_alpha=0.3)
    packed: dict[str, Any] = {"rows": (tokens,), "cu_seqlens": boundaries(tokens)}
    yield logprobs_case("sequence_logprobs/packed", **packed, stats=STATISTICS)
    yield logprobs_case("sequence_logprobs/packed, unshifted", **packed, shift=False, reduction="mean", **TRANSFORM)
    shared = torch.tensor([2, 0, tokens, 4])
    options: dict[str, Any] = {"ld_alpha": 0.0, "shared_lengths": shared, "inplace_backward": True}
    yield logprobs_case("sequence_logprobs/packed, LD-DPO, in place", **packed, **options)


def logprobs_case(
    name: str,
    rows: tuple[int, ...] = ROWS,
    vocabulary: int = VOCABULARY,
    peak: Peak | None = None,
    layout: Layout = as_it_is,
    **options: Any,
) -> Case:
    """Return a case of the function that `name` begins with; `peak` changes the logits after the labels are drawn."""
    function = name.partition("/")[0]
    if layout is as_it_is and options.get("inplace_backward"):
        # A gradient cannot be written over a leaf; a model's logits are the result of an operation, too.
        layout = torch.clone
    return Case(
        name=name,
        function=getattr(fastpref, function),
        definition=getattr(reference, function),
        draw=functools.partial(_draw, rows, vocabulary, peak, options),
        layout=layout,
        # Here the float64 log-softmax itself is off by half a ulp of the logits, so it cannot judge float64.
        dtypes=DTYPES[:3] if peak is near_certain else DTYPES,
        summed=_summed,
    )


def _draw(
    rows: tuple[int, ...], vocabulary: int, peak: Peak | None, options: dict[str, Any], generator: torch.Generator
) -> Arguments:
    logits, labels = 3 * normal(generator, *rows, vocabulary), draw_labels(generator, vocabulary, *rows)
    if peak is not None:
        logits = peak(logits, labels)
    return {"logits": logits}, {"labels": labels, **options}


def far_above_the_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Make one logit of each row 129 larger than the label's."""
    logits[..., 17] = 130.0
    return logits.scatter(-1, labels.clamp(min=0)[..., None], 1.0)


def near_certain(logits: Tensor, labels: Tensor) -> Tensor:
    """Make the label's logit about 20 nats larger than the log-sum-exp of the others: a probability of 1 - 1e-9."""
    return logits.scatter(-1, labels.clamp(min=0)[..., None], 32.0)


def _summed(leaves: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, float]:
    transform = {name: constants[name] for name in TRANSFORM if name in constants}
    return {"mean_logits": mean_magnitude(leaves["logits"], **transform)}

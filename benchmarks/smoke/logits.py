"""List the cases of log-probs from logits: every option, with vocabularies that enter the kernels' main loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.smoke.case import SmokeCase
from fastpref._core.results import STATISTICS
from fastpref.testing.case import DTYPES, TRANSFORM, Case, boundaries
from fastpref.testing.logprobs_cases import far_above_the_label, logprobs_case, near_certain
from fastpref_kernels.triton import launches

# Three blocks of 4096 logits and a last one, with rows that start at multiples of 16 bytes and with others.
EVEN, ODD = 3 * 4096 + 48, 3 * 4096 + 37
# Three segments, which several programs share.
LONG = 2 * launches.SHORTEST_SEGMENT + 37
NARROW = (torch.bfloat16, torch.float32)
SINGLE = (torch.float32,)


def logits_cases(device: str) -> Iterator[SmokeCase]:
    """Yield the cases; a GPU is given more rows than the interpreter."""
    rows, many = ((2, 4), (4, 5)) if device == "cpu" else ((2, 33), (4, 257))

    def cases(
        name: str,
        *,
        dtypes: tuple[torch.dtype, ...] = SINGLE,
        tier: int = 1,
        vocabulary: int = ODD,
        not_interpreted: str | None = None,
        **options: Any,
    ) -> Iterator[SmokeCase]:
        call: Case = logprobs_case(name, options.pop("rows", rows), vocabulary, **options)
        for dtype in dtypes:
            if dtype in call.dtypes:
                yield SmokeCase(call=call, dtype=dtype, tier=tier, not_interpreted=not_interpreted)

    yield from cases("token_logprobs/even", vocabulary=EVEN, dtypes=NARROW, tier=0)
    yield from cases("token_logprobs/even", vocabulary=EVEN, dtypes=(torch.float16, torch.float64))
    yield from cases("token_logprobs/odd", dtypes=DTYPES)
    yield from cases("token_logprobs/in-place", inplace_backward=True, shift=False, dtypes=DTYPES)
    yield from cases("token_logprobs/every-statistic", vocabulary=EVEN, stats=STATISTICS, dtypes=DTYPES)
    for name in STATISTICS:
        yield from cases(f"token_logprobs/{name}", stats=(name,), dtypes=NARROW)
    yield from cases("token_logprobs/transformed", dtypes=NARROW, **TRANSFORM)
    yield from cases("token_logprobs/transformed-in-place", inplace_backward=True, dtypes=DTYPES, **TRANSFORM)
    yield from cases("token_logprobs/transformed-statistics", stats=STATISTICS, dtypes=DTYPES, **TRANSFORM)
    yield from cases("token_logprobs/unshifted", shift=False, dtypes=NARROW)
    yield from cases("token_logprobs/padded-vocabulary", layout=_padded, stats=("entropy",), dtypes=NARROW)
    yield from cases("token_logprobs/padded-vocabulary-in-place", layout=_padded, inplace_backward=True, dtypes=NARROW)
    yield from cases("token_logprobs/every-other-logit", layout=_every_other, dtypes=NARROW)
    yield from cases("token_logprobs/every-other-logit-in-place", layout=_every_other, inplace_backward=True)
    for peak in (far_above_the_label, near_certain, _minus_infinity):
        name = f"token_logprobs/{peak.__name__.strip('_')}"
        yield from cases(name, peak=peak, shift=False, dtypes=NARROW)
        yield from cases(f"{name}-entropy", peak=peak, shift=False, stats=("entropy",), dtypes=NARROW)
    yield from cases("token_logprobs/nan-not-scored", peak=_not_scored, shift=False, dtypes=NARROW)
    yield from cases("token_logprobs/shared", vocabulary=LONG, dtypes=NARROW, tier=0)
    yield from cases("token_logprobs/shared-statistics", vocabulary=LONG, stats=STATISTICS, dtypes=NARROW)
    yield from cases("token_logprobs/shared-far-above", vocabulary=LONG, peak=far_above_the_label, dtypes=NARROW)
    yield from cases(
        "token_logprobs/shared-in-place", vocabulary=LONG, inplace_backward=True, dtypes=DTYPES, **TRANSFORM
    )
    yield from cases("token_logprobs/one-row", rows=(1, 2), dtypes=NARROW)
    yield from cases("token_logprobs/many-rows", rows=many, dtypes=(torch.bfloat16,))
    yield from cases("token_logprobs/less-than-a-block", vocabulary=37, dtypes=DTYPES, tier=2)

    yield from cases("sequence_logprobs/sum", dtypes=NARROW, tier=0)
    yield from cases("sequence_logprobs/shared", vocabulary=LONG, reduction="mean", dtypes=NARROW)
    yield from cases("sequence_logprobs/many-rows", rows=many, dtypes=(torch.bfloat16,))
    yield from cases("sequence_logprobs/mean", reduction="mean", inplace_backward=True, dtypes=DTYPES)
    yield from cases("sequence_logprobs/weighted", ld_alpha=0.3, dtypes=NARROW)
    tokens = rows[0] * rows[1]
    packed: dict[str, Any] = {"rows": (tokens,), "cu_seqlens": boundaries(tokens)}
    yield from cases("sequence_logprobs/packed", **packed, stats=STATISTICS, dtypes=NARROW)
    yield from cases("sequence_logprobs/packed-mean", **packed, reduction="mean", shift=False, **TRANSFORM)
    shared = torch.tensor([2, 0, tokens, 4])
    weighted: dict[str, Any] = {**packed, "ld_alpha": 0.3, "shared_lengths": shared, "inplace_backward": True}
    yield from cases("sequence_logprobs/packed-weighted", **weighted, dtypes=DTYPES)
    # More tokens and more sequences than are summed at a time.
    long: dict[str, Any] = {"vocabulary": 37, "tier": 2, "not_interpreted": "a minute for its 1100 programs"}
    yield from cases("sequence_logprobs/long", rows=(1, 1100), **long)
    bounds = torch.arange(1101)
    yield from cases("sequence_logprobs/many-sequences", rows=(1100,), cu_seqlens=bounds, shift=False, **long)


def _padded(leaf: Tensor) -> Tensor:
    """Return the logits in rows that hold more than a vocabulary."""
    width = leaf.shape[-1]
    return torch.nn.functional.pad(leaf, (0, 64 - width % 64))[..., :width]


def _every_other(leaf: Tensor) -> Tensor:
    """Return the logits with a stride of 2."""
    return leaf.repeat_interleave(2, -1)[..., ::2]


def _minus_infinity(logits: Tensor, labels: Tensor) -> Tensor:
    """Make every seventh logit -inf, unless it is the label's."""
    own = logits.gather(-1, labels.clamp(min=0)[..., None])
    logits[..., 5::7] = -torch.inf
    return logits.scatter(-1, labels.clamp(min=0)[..., None], own)


def _not_scored(logits: Tensor, labels: Tensor) -> Tensor:
    """Fill the rows of ignored labels with NaN."""
    return logits.masked_fill((labels == -100)[..., None], torch.nan)

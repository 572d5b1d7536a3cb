"""The operators against the definition, for shapes, masks and options that hypothesis draws."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.marks import examples
from tests.tolerance import ALL_STATS, DTYPES, assert_matches_reference


@st.composite
def transforms(draw: st.DrawFn) -> dict[str, Any]:
    options = {
        "temperature": st.sampled_from([0.5, 0.9, 1.7]),
        "logit_scale": st.sampled_from([0.2, 2.0]),
        "softcap": st.sampled_from([2.0, 30.0]),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(options))))
    return {name: draw(options[name]) for name in sorted(chosen)}


@st.composite
def inputs(draw: st.DrawFn, time: int) -> tuple[Tensor, Tensor, int]:
    """Draw logits (B, T, V) as a view of a base, their labels, and the ignore index."""
    batch, vocabulary = draw(st.integers(0, 4)), draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 2049])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]))
    logits = (scale * torch.randn(batch, time, vocabulary, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    labels = torch.randint(vocabulary, (batch, time), generator=generator)
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    labels[torch.rand(batch, time, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = ignore_index
    return logits, labels.to(draw(st.sampled_from([torch.int32, torch.int64]))), ignore_index


# On a handful of numbers eager's own error is a matter of luck, and hypothesis looks for bad luck. What it is to find
# here, a wrong index, mask or tail, is wrong by far more.
SLACK = 8.0
statistics = st.lists(st.sampled_from(ALL_STATS), unique=True).map(tuple)
layouts = st.sampled_from(
    [
        lambda base: base,
        lambda base: base.transpose(0, 1).contiguous().transpose(0, 1),
        lambda base: base.transpose(1, 2).contiguous().transpose(1, 2),
        lambda base: torch.cat((base, base), -1)[..., : base.shape[-1]],
        lambda base: torch.cat((base, base), 1)[:, : base.shape[1]],
        lambda base: base.repeat_interleave(3, -1)[..., ::3],
    ]
)


@examples(60)
@given(data=st.data(), time=st.integers(0, 7), options=transforms(), stats=statistics, shift=st.booleans())
def test_token_logprobs(data: Any, time: int, options: dict[str, Any], stats: tuple[str, ...], shift: bool) -> None:
    logits, labels, ignore_index = data.draw(inputs(time))
    layout = data.draw(layouts)
    assert_matches_reference(
        "token_logprobs",
        logits,
        labels,
        layout,
        slack=SLACK,
        ignore_index=ignore_index,
        shift=shift,
        stats=stats,
        **options,
    )


@examples(60)
@given(
    data=st.data(),
    time=st.integers(0, 7),
    options=transforms(),
    stats=statistics,
    shift=st.booleans(),
    reduction=st.sampled_from(["sum", "mean"]),
    ld_alpha=st.sampled_from([None, 0.0, 0.5]),
)
def test_sequence_logprobs(
    data: Any,
    time: int,
    options: dict[str, Any],
    stats: tuple[str, ...],
    shift: bool,
    reduction: str,
    ld_alpha: float | None,
) -> None:
    logits, labels, ignore_index = data.draw(inputs(time))
    lengths = None
    if ld_alpha is not None and logits.shape[0] % 2:
        lengths = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=(n := logits.shape[0]), max_size=n)))
    assert_matches_reference(
        "sequence_logprobs",
        logits,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        stats=stats,
        reduction=reduction,
        ld_alpha=ld_alpha,
        shared_lengths=lengths,
        slack=SLACK,
        **options,
    )


@examples(60)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 5), max_size=6),
    options=transforms(),
    shift=st.booleans(),
    reduction=st.sampled_from(["sum", "mean"]),
)
def test_packed(data: Any, lengths: list[int], options: dict[str, Any], shift: bool, reduction: str) -> None:
    logits, labels, ignore_index = data.draw(inputs(sum(lengths)))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    first = logits[:1] if logits.shape[0] else logits.new_zeros(1, *logits.shape[1:])
    row = labels[:1] if labels.shape[0] else labels.new_zeros(1, labels.shape[1])
    assert_matches_reference(
        "sequence_logprobs",
        first,
        row,
        cu_seqlens=bounds.to(data.draw(st.sampled_from([torch.int32, torch.int64]))),
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        stats=("entropy",),
        slack=SLACK,
        **options,
    )

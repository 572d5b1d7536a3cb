"""The log-prob kernels against the definition, and the edge table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import sequence_logprobs, token_logprobs
from fastpref_kernels.triton import logprobs as kernels
from tests.fastpref.test_edges import EDGES
from tests.tolerance import ALL_STATS, DTYPES, assert_matches_reference

# Where a GPU's answer is another, since it does not read labels and boundaries on the host to refuse them; and what is
# too large for an interpreter.
LEFT_OUT = ("IndexError", "ValueError", "2³¹")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unshifted": {"shift": False},
    "lse": {"stats": ("lse",)},
    "statistics": {"stats": ALL_STATS},
    "top1": {"stats": ("is_top1",)},
    "transform": {"temperature": 0.7, "logit_scale": 0.3, "softcap": 5.0},
    "transform and statistics": {"temperature": 1.3, "logit_scale": 0.6, "softcap": 4.0, "stats": ALL_STATS},
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    labels = torch.randint(shape[-1], shape[:-1])
    labels[..., 1] = -100
    labels[..., -2], labels[..., -1] = 0, shape[-1] - 1
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype), labels


@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits, labels = make(2, 6, 75, dtype=dtype)
    assert_matches_reference("token_logprobs", logits, labels, **options)


@pytest.mark.parametrize("stats", [(), ALL_STATS])
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 33, 64, 160])
def test_vocabulary(vocabulary: int, stats: tuple[str, ...]) -> None:
    logits, labels = make(2, 5, vocabulary)
    assert_matches_reference("token_logprobs", logits, labels, stats=stats)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("packed", [False, True])
def test_sequences(packed: bool, ld_alpha: float | None, shift: bool, reduction: str) -> None:
    options: dict[str, Any] = {"shift": shift, "reduction": reduction, "ld_alpha": ld_alpha, "stats": ("entropy",)}
    if packed:
        logits, labels = make(17, 75)
        options["cu_seqlens"] = torch.tensor([0, 5, 5, 6, 17], dtype=torch.int32)
    else:
        logits, labels = make(4, 5, 75)
        labels[2] = -100
    assert_matches_reference("sequence_logprobs", logits, labels, **options)


def test_a_sequence_longer_than_its_summing_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SUM_BLOCK", kernels.tl.constexpr(4))
    logits, labels = make(2, 11, 40)
    assert_matches_reference("sequence_logprobs", logits, labels, reduction="mean")
    bounds = torch.tensor([0, 1, 2, 3, 5, 8, 11])
    assert_matches_reference("sequence_logprobs", logits[0], labels[0], cu_seqlens=bounds)


@pytest.mark.parametrize("gap", [30.0, 60.0, 89.0, 115.0, 130.0])
@pytest.mark.parametrize("stats", [(), ("entropy",)])
def test_other_logits_far_above_the_label(stats: tuple[str, ...], gap: float) -> None:
    logits, labels = make(2, 4, 75)
    logits[..., 40] = logits.amax(-1) + gap
    assert_matches_reference("token_logprobs", logits, labels, stats=stats)


@pytest.mark.parametrize("gap", [16.0, 20.0, 40.0])
def test_a_label_all_but_certain_keeps_its_digits(gap: float) -> None:
    logits, labels = torch.zeros(1, 3, 75), torch.full((1, 3), 40)
    logits[..., 40] = gap
    logp = token_logprobs(logits, labels)
    wanted = -math.log1p(74 * math.exp(-gap))
    assert logp.flatten().tolist() == pytest.approx([wanted] * 2, rel=1e-6)


def test_a_common_offset_costs_nothing() -> None:
    logits, labels = make(2, 4, 75)
    logits = (logits * 64).round() / 64  # so that the offset itself rounds nothing away
    assert torch.equal(token_logprobs(logits, labels), token_logprobs(logits + 8192, labels))


LAYOUTS = {
    "time and vocabulary transposed": lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice of a padded vocabulary": lambda z: torch.nn.functional.pad(z, (0, 11))[..., :-11],
    "a slice of time": lambda z: torch.nn.functional.pad(z, (0, 0, 2, 1))[:, 2:-1],
    "every other logit": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda z: z[:1].expand(z.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout: Any) -> None:
    logits, labels = make(2, 5, 75)
    assert_matches_reference("token_logprobs", logits, labels, layout, stats=("entropy",))
    assert_matches_reference("sequence_logprobs", logits, labels, layout)


@dtypes
def test_in_place_gradient_is_the_fresh_one(dtype: torch.dtype) -> None:
    base, labels = make(2, 5, 75, dtype=dtype)
    gradients = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = leaf * 1
        sequence_logprobs(logits, labels, inplace_backward=inplace).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert torch.equal(logits.detach(), gradients[0])


def test_bits_do_not_depend_on_the_rest_of_the_batch() -> None:
    logits, labels = make(5, 7, 75)
    together = sequence_logprobs(logits, labels)
    for i in range(5):
        assert torch.equal(sequence_logprobs(logits[i : i + 1], labels[i : i + 1])[0], together[i])
    packed = sequence_logprobs(logits.reshape(-1, 75), labels.reshape(-1), cu_seqlens=torch.arange(0, 36, 7))
    assert torch.equal(packed, together)


def test_strided_boundaries() -> None:
    logits, labels = make(9, 75)
    bounds = torch.tensor([0, 7, 4, 7, 9, 7])[::2]
    assert_matches_reference("sequence_logprobs", logits, labels, cu_seqlens=bounds)


@pytest.mark.parametrize("bounds", [[0, 3], [0, 3, 5], [2, 5, 8], [0]])
def test_tokens_that_the_boundaries_leave_out_touch_no_memory(bounds: list[int]) -> None:
    logits, labels = make(8, 75)
    n = len(bounds) - 1
    # Room behind what a launch is given, so that a write past its end is seen.
    sequences, counts, tickets = torch.full((8,), 7.0), torch.full((8,), 7), torch.full((8,), 7)
    given = iter((sequences[:n].zero_(), counts[:n].zero_(), tickets[:n].zero_()))

    class Watched(torch.Tensor):
        def new_zeros(self, *size: Any, **options: Any) -> Tensor:
            return next(given)

    result = kernels.logprobs(
        logits[None].as_subclass(Watched),
        labels[None],
        torch.tensor(bounds),
        None,
        -100,
        True,
        1.0,
        1.0,
        None,
        "sum",
        0,
    )
    assert all((watched[n:] == 7).all() for watched in (sequences, counts, tickets))
    logps = result[0].as_subclass(Tensor)[0]
    inside = torch.zeros(7, dtype=torch.bool)
    inside[bounds[0] : bounds[-1]] = True
    assert (logps[~inside] == 0).all()


def test_a_label_out_of_range_is_nan_and_reads_nothing() -> None:
    logits, labels = make(2, 5, 75)
    clean = token_logprobs(logits, labels)
    for bad in (75, -1, 2**40):
        labels[1, 3] = bad
        tokens = token_logprobs(logits, labels)
        assert tokens[1, 2].isnan()
        tokens[1, 2] = clean[1, 2]
        assert torch.equal(tokens, clean)


@pytest.mark.parametrize("text", [text for text in EDGES if not any(error in text for error in LEFT_OUT)])
def test_edge(text: str) -> None:
    EDGES[text](torch.float32)

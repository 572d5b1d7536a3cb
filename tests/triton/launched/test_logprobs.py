"""The log-prob kernels against the definition, and the edge table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

import fastpref
from benchmarks.sweep.case import poisoned
from fastpref import sequence_logprobs, token_logprobs
from fastpref_kernels.contract import STATISTICS
from fastpref_kernels.triton import launches, logprobs_finish, logprobs_rows
from fastpref_kernels.triton import logprobs as kernels
from tests.fastpref.test_edges import EDGES
from tests.tolerance import ALL_STATS, DTYPES, assert_matches_reference, run

# Where a GPU's answer is another, since it does not read labels and boundaries on the host to refuse them; and what is
# too large for an interpreter.
LEFT_OUT = ("IndexError", "ValueError", "2³¹")
TRANSFORM = {"temperature": 0.7, "logit_scale": 0.3, "softcap": 5.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unshifted": {"shift": False},
    **{name: {"stats": (name,)} for name in STATISTICS},
    "statistics": {"stats": ALL_STATS},
    "transform": TRANSFORM,
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
    for module in (logprobs_finish, logprobs_rows):
        monkeypatch.setattr(module, "SUM_BLOCK", tl.constexpr(4))
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


PROGRAMS = (1, 3, 8)
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("token_logprobs", {}),
    "statistics": ("token_logprobs", {"stats": ALL_STATS}),
    "capped": ("token_logprobs", TRANSFORM),
    "capped statistics": ("token_logprobs", {**TRANSFORM, "stats": ALL_STATS}),
    "means": ("sequence_logprobs", {"reduction": "mean"}),
    "packed means": (
        "sequence_logprobs", {"reduction": "mean", "cu_seqlens": torch.tensor([0, 3, 3, 4, 7]), "stats": ("entropy",)}
    ),
    "capped, in place": ("sequence_logprobs", {**TRANSFORM, "inplace_backward": True}),
}  # fmt: skip


def shared_by(programs: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `programs` programs share each row, as far as it has parts; return the list that the numbers go to."""
    used: list[int] = []

    def row_programs(rows: int, parts: int, multiprocessors: int) -> int:
        used.append(min(programs, parts))
        return used[-1]

    monkeypatch.setattr(launches, "row_programs", row_programs)
    return used


def in_range(labels: Tensor) -> Tensor:
    """Spread the labels over a row, so that they are in its first segment, in its last, and where two meet."""
    return labels.copy_(torch.tensor([191, 0, 63, 64, 32, 127, 299]).view(labels.shape))


def shared_rows(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits, labels = make(*((7,) if "cu_seqlens" in options else (1, 7)), 300, dtype=dtype)
    return logits, in_range(labels)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in SHARED), ("capped statistics", torch.float64)]
)
def test_bits_do_not_depend_on_the_programs_that_share_a_row(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, options = SHARED[name]
    base, labels = shared_rows(options, dtype)
    labels[..., 1] = -100
    found = []
    for programs in PROGRAMS:
        used = shared_by(programs, monkeypatch)
        with poisoned():
            found.append(run(getattr(fastpref, function), base, labels, lambda leaf: leaf * 1, options))
        # Five segments of two blocks; ten blocks of a gradient.
        assert used == [min(programs, 5), programs]
    for other in found[1:]:
        for field, value in found[0].items():
            assert torch.equal(value, other[field]), field


@pytest.mark.parametrize("programs", [3, 8])
@pytest.mark.parametrize("name", ["statistics", "capped", "packed means"])
def test_rows_shared_by_several_programs(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    function, options = SHARED[name]
    logits, labels = shared_rows(options)
    shared_by(programs, monkeypatch)
    assert_matches_reference(function, logits, labels, **options)


@pytest.mark.parametrize("programs", [1, 3])
def test_a_shared_row_far_above_its_label_is_summed_again(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = shared_rows({})
    logits[..., 170] = logits.amax(-1) + 115.0
    logits[0, 1, 170] = math.inf
    shared_by(programs, monkeypatch)
    tokens = token_logprobs(logits, labels)
    assert tokens[0, 1].isnan()
    logits[0, 1, 170] = 115.0
    assert_matches_reference("token_logprobs", logits, labels)


@pytest.mark.parametrize("stats", [(), ALL_STATS])
def test_bits_do_not_depend_on_the_number_of_rows(stats: tuple[str, ...]) -> None:
    """A batch of few rows is shared by several programs a row, and one of many is not."""
    logits, labels = (value.repeat_interleave(2, 1) for value in shared_rows({}))
    assert [launches.row_programs(rows, 5, 1) for rows in (13, 1)] == [1, 5]
    together = token_logprobs(logits, labels, stats=stats)
    for t in range(0, 13, 2):
        alone = token_logprobs(logits[:, t : t + 2], labels[:, t : t + 2], stats=stats)
        for whole, part in zip(together if stats else [together], alone if stats else [alone], strict=True):
            assert torch.equal(whole[:, t : t + 1], part)


def test_a_row_has_programs_for_all_multiprocessors() -> None:
    """No program is left without a part of the row, and rows that fill the device by themselves have one each."""
    assert launches.row_programs(1, 8, 132) == 8
    assert launches.row_programs(64, 8, 132) == 8
    assert launches.row_programs(256, 8, 132) == 4  # five would leave one without segments
    assert launches.row_programs(8 * 132, 8, 132) == 1
    assert launches.row_programs(10**6, 8, 132) == 1


@pytest.mark.parametrize("block", [1024, 4096])
@pytest.mark.parametrize("V", [1, 5000, 16384, 16385, 128256, 262144, 10**7])
def test_segments_cover_a_row(V: int, block: int) -> None:
    length = launches.segment_blocks(V, block) * block
    assert launches.SEGMENTS * length >= V
    assert length >= launches.SHORTEST_SEGMENT


TIES = {
    "before": (3, 200),
    "after": (200, 3),
    "a block before": (40, 60),
    "the same block": (66, 67),
    "alone": (70, 70),
}


@pytest.mark.parametrize("label", ["first", "second"])
@pytest.mark.parametrize("places", TIES.values(), ids=TIES)
def test_top1_of_equal_logits_is_the_first(places: tuple[int, int], label: str) -> None:
    logits, _ = make(1, 2, 300)
    logits[..., places] = 50.0
    labels = torch.full((1, 2), places[label == "second"])
    (top1,) = token_logprobs(logits, labels, stats=("is_top1",)).is_top1.flatten().tolist()
    assert top1 == (labels[0, 0] == min(places))


@pytest.mark.parametrize("label", [3, 40, 200])
@pytest.mark.parametrize("places", TIES.values(), ids=TIES)
def test_the_margin_of_equal_logits_is_0(places: tuple[int, int], label: int) -> None:
    """Equal logits of one lane, of one block and of two segments, whether one is the label's or not."""
    logits, _ = make(1, 2, 300)
    logits[..., places] = 50.0
    labels = torch.full((1, 2), label)
    (margin,) = token_logprobs(logits, labels, stats=("top2_margin",)).top2_margin.flatten().tolist()
    assert (margin == 0.0) == (places[0] != places[1])


@pytest.mark.parametrize(
    ("values", "margin"),
    [
        ({}, 7.5),
        ({40: 9.0}, 1.0),  # the label, which is in no sum, is the best
        ({40: 7.75}, 0.25),
        ({200: -math.inf, 40: -math.inf}, 7.5),
        ({3: math.inf}, math.inf),
        ({40: math.inf}, math.inf),
        ({3: math.nan}, math.nan),
        ({40: math.nan}, math.nan),
        ({250: torch.finfo(torch.float32).min}, 7.5),
        (dict.fromkeys(range(300), -math.inf), math.nan),
        ({**dict.fromkeys(range(300), -math.inf), 299: 1.0}, math.inf),
        ({**dict.fromkeys(range(300), torch.finfo(torch.float32).min), 7: 0.0}, -torch.finfo(torch.float32).min),
    ],
)
def test_margins(values: dict[int, float], margin: float) -> None:
    """The best and the second best wherever they are, with infinities, NaN and the lowest numbers among them."""
    logits = torch.zeros(1, 2, 300)
    logits[..., 7], logits[..., 9] = 8.0, 0.5
    for column, value in values.items():
        logits[..., column] = value
    found = token_logprobs(logits, torch.full((1, 2), 40), stats=("top2_margin",)).top2_margin
    torch.testing.assert_close(found, torch.full_like(found, margin), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("label", [5, 100, 299])
@pytest.mark.parametrize("peak", [7, 33, 100, 298])
def test_statistics_of_lanes_of_minus_infinity(peak: int, label: int) -> None:
    """Lanes and segments without a finite logit add nothing, and those that see one late lose nothing."""
    logits, labels = torch.full((1, 4, 300), -math.inf), torch.full((1, 4), label)
    logits[..., label] = -2.0
    logits[0, 0, peak], logits[0, 1, peak], logits[0, 2, [peak, peak - 1]] = 30.0, -3.0, torch.tensor([4.0, 6.0])
    stats = ("lse", "entropy", "is_top1", "log_sum_sq_probs")
    assert_matches_reference("token_logprobs", logits, labels, stats=stats)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("column", [2, 40, 150, 298])
def test_one_bad_logit_makes_every_statistic_of_its_row_nan(column: int, value: float) -> None:
    logits, labels = make(1, 4, 300)
    clean = token_logprobs(logits, labels, stats=ALL_STATS)
    logits[0, 2, column] = value
    labels[0, 3] = 77
    found = token_logprobs(logits, labels, stats=ALL_STATS)
    for name in ("logprobs", "lse", "entropy", "log_sum_sq_probs"):
        assert getattr(found, name)[0, 2].isnan()
    assert not found.is_top1[0, 2]
    assert torch.equal(found.entropy[0, :2], clean.entropy[0, :2])


def test_a_row_of_minus_infinity_is_kept_as_such() -> None:
    """A shard of a vocabulary is told by it that it has no mass."""
    logits, labels = torch.full((1, 2, 300), -math.inf), torch.full((1, 2), 40)
    scoring = (-100, True, 1.0, 1.0, None, "none")
    _, _, norm, *_ = kernels.logprobs(logits, labels, None, None, *scoring, sum(STATISTICS.values()))
    assert norm[0, 0, 0] == -math.inf


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
    row_tickets = torch.full((9,), 7)
    zeros = (sequences[:n].zero_(), counts[:n].zero_(), tickets[:n].zero_(), row_tickets[:7].zero_())
    given = iter(zeros)

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
    assert row_tickets.tolist() == [2] * 7 + [7] * 2
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

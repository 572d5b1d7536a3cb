"""The row pass over tiles of products, called as it is launched, against float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastpref_kernels.contract import LINEAR_STATISTICS, STATISTICS, RowSums, Statistic
from fastpref_kernels.triton import linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else "xpu"
INF, NAN = math.inf, math.nan
ENTROPY, MEAN, TOP1 = Statistic.ENTROPY, Statistic.MEAN_LOGITS, Statistic.IS_TOP1
ALL_STATS = sum(STATISTICS.values())
# The sums that a statistic needs, beside those that a log-prob needs.
SUMS: dict[str, set[str]] = {
    "lse": set(),
    "entropy": {"weighted"},
    "mean_logits": {"total"},
    "is_top1": {"before", "after"},
    "log_sum_sq_probs": {"squares"},
    "top2_margin": {"before", "after", "second"},
    "dropped_mass": set(),
}
# The interpreter cuts a float32 off where a GPU rounds it.
BFLOAT16 = 2.0**-7 if INTERPRETED else 2.0**-8
# An exponent of 46 in float32, which the label's 32 below its anchor make in powers of 2, is good to 2e-6.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: BFLOAT16, torch.float16: 1e-3}
# logit_scale, temperature, softcap
PLAIN, SCALED, CAPPED = (1.0, 1.0, None), (0.6, 1.3, None), (0.6, 1.3, 4.0)
products = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@dataclass
class Folded:
    """Everything that folding the columns in tiles gives, and the truth: z, dz/dx and which columns are not targets."""

    state: Tensor  # (planes of RowSums, R)
    anchors: Tensor  # (tiles, R)
    masses: Tensor  # (tiles, R)
    store: Tensor | None  # (R, V)
    z: Tensor  # (R, V)
    slope: Tensor  # (R, V)
    others: Tensor  # (R, V)
    tiles: list[slice]

    @property
    def sums(self) -> RowSums:
        """The state by name."""
        return RowSums.of(self.state)

    def exps(self, anchor: Tensor) -> Tensor:
        """exp(z - anchor), 0 at the target; a row without a finite z has no anchor, and none of its columns count."""
        z = self.z - anchor[:, None].clamp(min=-1e300)
        return torch.where(self.others, z.exp(), 0.0)

    def spread(self) -> Tensor:
        """exp(z - the anchor of its tile), (R, V)."""
        return torch.cat([self.exps(a)[:, tile] for a, tile in zip(self.anchors, self.tiles, strict=True)], 1)


def transformed(x: Tensor, bias: Tensor | None, transform: tuple[float, float, float | None]) -> tuple[Tensor, Tensor]:
    """z and dz/dx in float64."""
    scale, temperature, softcap = transform
    x = x.double() if bias is None else x.double() + bias.double()
    if softcap is None:
        return x * scale / temperature, torch.full_like(x, scale / temperature)
    y = torch.tanh(x * scale / softcap)
    return softcap * y / temperature, scale / temperature * (1 - y * y)


def fold(
    x: Tensor, targets: Tensor, tile: int, *, bias: Tensor | None = None, stats: int = ALL_STATS,
    transform: tuple[float, float, float | None] = PLAIN, store: torch.dtype | None = None,
    layout: Callable[[Tensor], Tensor] = lambda z: z.clone(), label: Tensor | None = None,
) -> Folded:  # fmt: skip
    """Fold x (R, V) tile by tile, as the label's z plus 32 anchors it."""
    R, V = x.shape
    z, slope = transformed(x, bias, transform)
    if label is None:
        label = z.gather(1, targets[:, None])[:, 0].to(x.dtype)
    state = RowSums.start((R,), torch.device("cpu"))
    RowSums.of(state).anchor.copy_(label + 32)
    tiles = [slice(c, min(c + tile, V)) for c in range(0, V, tile)]
    state = state.to(DEVICE)
    anchors, masses = torch.empty(2, len(tiles), R, dtype=torch.float64, device=DEVICE)
    kept = None if store is None else torch.empty(R, V + 8, dtype=store, device=DEVICE)
    for i, columns in enumerate(tiles):
        linear.fold(
            layout(x[:, columns]).to(DEVICE), None if bias is None else bias[columns].to(DEVICE), targets.to(DEVICE),
            columns.start, *transform, stats, state, anchors[i], masses[i], None if kept is None else kept[:, columns],
        )  # fmt: skip
    if kept is not None:
        assert kept[:, V:].isnan().all(), "something was written beyond the columns"
        kept = kept[:, :V].cpu()
    others = torch.arange(V) != targets[:, None]
    return Folded(state.cpu(), anchors.cpu(), masses.cpu(), kept, z, slope, others, tiles)


def close(ours: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Within `bound`, or what float32 can no longer hold; NaNs and infinities are where the truth's are."""
    ours, truth = ours.double(), truth.double()
    finite = truth.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(7), truth[~finite].nan_to_num(7)), f"{ours}, not {truth}"
    excess = ((ours - truth).abs() - bound - torch.finfo(torch.float32).tiny)[finite]
    assert (excess <= 0).all(), f"{ours}, not {truth}; beyond the bound by {excess.max():.1e}"


def check(found: Folded, targets: Tensor, tolerance: float, stats: int = ALL_STATS) -> None:
    """Everything against the definition at the anchors that were used."""
    sums, anchor = found.sums, found.sums.anchor
    assert torch.equal(anchor, found.anchors[-1])
    e = found.exps(anchor)
    d = torch.where(e > 0, found.z - anchor[:, None], 0.0)
    close(sums.rest, e.sum(1), tolerance * e.sum(1))
    spread = found.spread()
    for columns, mass in zip(found.tiles, found.masses, strict=True):
        truth = spread[:, columns].sum(1)
        close(mass, truth, tolerance * truth)
    if found.store is not None:
        truth = spread * found.slope
        close(found.store, truth, tolerance * spread + TOLERANCE[found.store.dtype] * truth)
        assert (found.store.gather(1, targets[:, None]) == 0).all()
    if stats & ENTROPY:
        close(sums.weighted, (e * d).sum(1), tolerance * (e * (1 + d.abs())).sum(1))
    if stats & Statistic.LOG_SUM_SQ_PROBS:
        close(sums.squares, (e * e).sum(1), 2 * tolerance * (e * e).sum(1))
    if stats & MEAN:
        close(sums.total, found.z.sum(1), tolerance * found.z.abs().sum(1))
    if stats & (TOP1 | Statistic.TOP2_MARGIN):
        column = torch.arange(found.z.shape[1])
        for ours, side in ((sums.before, column < targets[:, None]), (sums.after, column > targets[:, None])):
            highest = torch.where(side, found.z, -INF).amax(1)
            close(ours, highest, tolerance * highest.abs())
    if stats & Statistic.TOP2_MARGIN:
        others = torch.nn.functional.pad(torch.where(found.others, found.z, -INF), (0, 1), value=-INF)
        second = others.topk(2).values[:, 1]
        close(sums.second, second, tolerance * second.abs())
    z_y = found.z.gather(1, targets[:, None])[:, 0]
    close(sums.label, z_y, tolerance * z_y.abs())


def rows(R: int, V: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    x = (scale * torch.randn(R, V, dtype=torch.float64)).to(dtype)
    targets = torch.randint(V, (R,))
    targets[0], targets[-1] = 0, V - 1
    return x, targets


@products
@pytest.mark.parametrize("transform", [SCALED, CAPPED], ids=["scaled", "capped"])
@pytest.mark.parametrize("names", [("entropy", "mean_logits", "is_top1"), *((name,) for name in LINEAR_STATISTICS)])
def test_options(transform: tuple[float, float, float | None], dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """The sums of the statistics that are asked for, and no others."""
    stats = sum(LINEAR_STATISTICS[name] for name in names)
    x, targets = rows(3, 110, dtype)
    store = torch.float64 if dtype == torch.float64 else torch.float32
    found = fold(x, targets, 70, stats=stats, transform=transform, store=store)
    check(found, targets, TOLERANCE[dtype], stats)
    asked = {"anchor", "rest", "label"}.union(*(SUMS[name] for name in names))
    start = RowSums.of(RowSums.start((3,), torch.device("cpu")))
    for name in set(RowSums._fields) - asked:
        assert torch.equal(getattr(found.sums, name), getattr(start, name)), name


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 96, 100])
def test_every_target_of_every_width(width: int) -> None:
    """A label in each block of its tile, and in none, for tiles of full blocks and others."""
    targets = torch.tensor(sorted({0, width // 2, width - 1, min(width, 32) - 1, width, 2 * width - 1}))
    x, _ = rows(len(targets), 2 * width)
    check(fold(x, targets, width, store=torch.float32), targets, 1e-5)


@pytest.mark.parametrize(
    ("bias", "transform"), [(torch.bfloat16, CAPPED), (torch.float32, SCALED), (torch.float64, CAPPED)]
)
def test_bias(bias: torch.dtype, transform: tuple[float, float, float | None]) -> None:
    x, targets = rows(3, 90)
    found = fold(x, targets, 50, bias=torch.randn(90).to(bias), transform=transform, store=torch.bfloat16)
    check(found, targets, 1e-5)


def test_bias_of_minus_infinity() -> None:
    """As a padded vocabulary has: nothing is added to any sum, and 0 * log 0 is 0."""
    x, targets = rows(3, 128)
    targets.clamp_(max=90)
    bias = torch.zeros(128)
    bias[91:] = -INF
    stats = ALL_STATS & ~MEAN
    check(fold(x, targets, 64, bias=bias, stats=stats, store=torch.bfloat16), targets, 1e-5, stats)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice of a buffer": lambda z: torch.nn.functional.pad(z, (0, 8))[:, : z.shape[1]],
    "odd stride": lambda z: torch.nn.functional.pad(z, (0, 1 + z.shape[1] % 2))[:, : z.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    x, targets = rows(4, 100)
    check(fold(x, targets, 70, layout=layout, store=torch.bfloat16), targets, 1e-5)


@products
@pytest.mark.parametrize(
    ("gap", "transform"), [*((gap, PLAIN) for gap in (60.0, 85.0, 500.0, 1e5)), (500.0, SCALED), (1e5, CAPPED)]
)
def test_far_above_the_anchor(gap: float, dtype: torch.dtype, transform: tuple[float, float, float | None]) -> None:
    """Raised in the first tile, in a later one, twice, and not where the label itself is the high one."""
    x, targets = rows(5, 160, dtype)
    targets[:] = 40
    x[0, 3] += gap
    x[1, 100] += gap
    x[2, 10], x[2, 120] = x[2, 10] + gap, x[2, 120] + 3 * gap
    x[3, 40] += gap
    found = fold(x, targets, 64, transform=transform, store=torch.float32)
    # z itself is that far from 0.
    check(found, targets, max(TOLERANCE[dtype], torch.finfo(dtype).eps * found.z.abs().max().item()))
    assert (found.sums.rest < 2.0**60).all()
    assert all(getattr(found.sums, name).isfinite().all() for name in ("anchor", "weighted", "squares", "total"))
    if gap == 500.0 and transform[2] is None:
        raised = found.anchors[1:] > found.anchors[:-1]
        assert raised.any(0).tolist() == [False, True, True, False, False]
        top = torch.where(found.others, found.z, -INF).amax(1)[:3]
        torch.testing.assert_close(found.sums.anchor[:3], top, rtol=1e-6, atol=0.0)


@products
def test_raised_a_little(dtype: torch.dtype) -> None:
    """Sums at the old anchor are carried to one so near that they still count."""
    x, targets = rows(2, 160, dtype)
    targets[:] = 40
    x[0, 3], x[0, 100], x[0, 150] = x[0, 40] + 32 + 6, x[0, 40] + 32 + 9, x[0, 40] + 32 + 8
    found = fold(x, targets, 64, store=dtype)
    check(found, targets, TOLERANCE[dtype])
    assert (found.anchors[1:] > found.anchors[:-1]).tolist() == [[True, False], [False, False]]


# What to put in a row whose target is column 40, by column; rows have 160 in tiles of 64.
LABEL = slice(40, 41)
EDGES: dict[str, tuple[tuple[slice, float], ...]] = {
    "label -inf": ((LABEL, -INF),),
    "label -inf, first tile -inf": ((slice(0, 64), -INF),),
    "label -inf, first tile -inf, others far below": ((LABEL, -INF), (slice(0, 64), -INF), (slice(64, 160), -200.0)),
    "label and last tile -inf": ((LABEL, -INF), (slice(128, 160), -INF)),
    "others -inf": ((slice(0, 40), -INF), (slice(41, 160), -INF)),
    "some -inf": ((slice(3, 4), -INF), (slice(70, 71), -INF), (slice(150, 151), -INF)),
    "lowest numbers": ((slice(0, 40), -3.4028234663852886e38),),
    "others far below": ((slice(0, 40), -1e4), (slice(41, 160), -1e4)),
}


@products
@pytest.mark.parametrize("values", EDGES.values(), ids=EDGES)
def test_edges(values: tuple[tuple[slice, float], ...], dtype: torch.dtype) -> None:
    x, _ = rows(2, 160, dtype)
    targets = torch.tensor([40, 40])
    for columns, value in values:
        x[0, columns] = value
    # Of the lowest numbers their dtype does not hold the sum.
    stats = ALL_STATS if torch.equal(x.sum(1).isinf(), x.isinf().any(1)) else ALL_STATS & ~MEAN
    found = fold(x, targets, 64, stats=stats, store=dtype)
    check(found, targets, TOLERANCE[dtype], stats)
    # An anchor far above all that is summed loses all of it, and nothing in `check` would see that.
    sums = found.sums
    lse = sums.anchor + (sums.rest + (sums.label - sums.anchor).exp()).log()
    truth = found.z.logsumexp(1)
    close(lse, truth, TOLERANCE[dtype] * (1 + truth.abs()))


@pytest.mark.parametrize("stats", [0, ALL_STATS])
def test_everything_minus_infinity(stats: int) -> None:
    x, targets = torch.full((2, 100), -INF), torch.tensor([40, 99])
    found = fold(x, targets, 64, stats=stats, store=torch.bfloat16)
    sums = found.sums
    assert (sums.rest == 0).all()
    assert (sums.weighted == 0).all()
    assert (sums.squares == 0).all()
    assert (found.masses == 0).all()
    assert found.store is not None
    assert (found.store == 0).all()


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("stats", [0, ALL_STATS])
def test_not_a_number(value: float, stats: int) -> None:
    """NaN or +inf anywhere but at the label ends in a NaN that later tiles keep; the row beside it does not see it."""
    x, _ = rows(5, 160)
    targets = torch.full((5,), 40)
    x[range(4), [3, 33, 70, 159]] = value
    found = fold(x, targets, 64, stats=stats)
    assert found.sums.rest.isnan().tolist() == [True] * 4 + [False]
    if stats & TOP1:
        assert not any(on_top(found)[:4])
    if stats & Statistic.TOP2_MARGIN:
        # A row with +inf has a margin.
        highest = torch.maximum(found.sums.before, found.sums.after)
        assert torch.equal(highest.nan_to_num(7)[:4], torch.full((4,), value).double().nan_to_num(7))
        assert found.sums.second.isfinite()[4]
    assert found.masses.isfinite()[:, 4].all()


@pytest.mark.parametrize("value", [INF, NAN])
def test_label_column_is_in_no_sum(value: float) -> None:
    """What is at the label's column does not count where the label was computed elsewhere, but in the total of z."""
    x, targets = rows(2, 160)
    targets[:] = 40
    x[0, 50] += 200
    label = x[:, 40].clone()
    clean = fold(x, targets, 64, store=torch.float32, label=label)
    x[:, 40] = value
    found = fold(x, targets, 64, store=torch.float32, label=label)
    for name in ("anchor", "rest", "weighted", "squares", "before", "after", "second"):
        assert torch.equal(getattr(found.sums, name), getattr(clean.sums, name)), name
    assert torch.equal(found.masses, clean.masses)
    assert found.store is not None
    assert clean.store is not None
    assert torch.equal(found.store, clean.store)
    assert not found.sums.total.isfinite().any()


@pytest.mark.parametrize("value", [INF, NAN])
def test_label_not_a_number(value: float) -> None:
    """Nothing else is invented for such a row: a NaN anchor is replaced, an infinite one leaves its sums 0."""
    x, targets = rows(1, 100)
    found = fold(x, targets, 64, label=torch.full((1,), value))
    assert found.sums.rest.isfinite().all()


def on_top(found: Folded) -> list[bool]:
    """Whether the label is the first of the highest logits."""
    sums = found.sums
    return ((sums.before < sums.label) & (sums.after <= sums.label)).tolist()


def test_ties() -> None:
    """A column that equals the label is ahead of it where it comes first, in any tile and any block."""
    columns = [0, 31, 39, 41, 63, 64, 100, 159]
    x = torch.zeros(len(columns), 160) - 1
    targets = torch.full((len(columns),), 40)
    x[:, 40] = 2
    for row, column in enumerate(columns):
        x[row, column] = 2
    found = fold(x, targets, 64, stats=TOP1)
    assert on_top(found) == [column > 40 for column in columns]
    targets[:] = 100
    x[:, 40], x[:, 100] = -1, 2
    assert on_top(fold(x, targets, 64, stats=TOP1)) == [column >= 100 for column in columns]


def test_rows_do_not_depend_on_the_batch() -> None:
    x, targets = rows(4, 150)
    together, alone = fold(x, targets, 70), fold(x[2:3], targets[2:3], 70)
    assert torch.equal(together.state[:, 2:3], alone.state)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_store_beyond_32_bits(unpoisoned: None, softcap: float | None) -> None:
    """The last of three rows of a store begins beyond 2³¹ elements; only what is written is ever touched."""
    x, targets = rows(3, 40)
    stride = 2**31 - 8
    try:
        kept = torch.empty(2 * stride + 40, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 40), (stride, 1))
    except RuntimeError:
        pytest.skip("8 GiB cannot be reserved")
    state = RowSums.start((3,), torch.device("cpu"))
    z, slope = transformed(x, None, (1.0, 1.0, softcap))
    label = z.gather(1, targets[:, None])[:, 0].float()
    state[0] = label + 32
    state = state.to(DEVICE)
    outs = torch.empty(2, 3, dtype=torch.float64, device=DEVICE)
    linear.fold(
        x.to(DEVICE), None, targets.to(DEVICE), 0, 1.0, 1.0, softcap, 0, state, *outs, kept
    )  # fmt: skip
    truth = torch.where(torch.arange(40) != targets[:, None], (z - label.double()[:, None] - 32).exp() * slope, 0.0)
    close(kept.cpu(), truth, (1e-5 + BFLOAT16) * truth)


def gradient(
    x: Tensor, targets: Tensor, bias: Tensor | None, transform: tuple[float, float, float | None],
    grad: Tensor | None, grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """norm (4, R) anchored at the label plus 32, and the gradient of x by autograd, in float64."""
    leaf = x.double().requires_grad_()
    z, _ = transformed(leaf, bias, transform)
    logps = z.log_softmax(1)
    logp = logps.gather(1, targets[:, None])[:, 0]
    entropy = -(logps.exp() * logps).sum(1)
    anchor = z.gather(1, targets[:, None])[:, 0].detach() + 32
    norm = torch.stack([anchor, (anchor - z.logsumexp(1)).exp(), logp, entropy]).detach()
    loss = sum((value * g.double()).sum() for value, g in ((logp, grad), (entropy, grad_entropy)) if g is not None)
    (expected,) = torch.autograd.grad(loss, leaf)  # type: ignore[arg-type]
    return norm, expected


# Of the log-probs, of the entropies, of both.
PARTS = ((True, False), (False, True), (True, True))
GRADIENTS = [
    (out, *parts, transform)
    for out in (torch.float32, torch.float64) for parts in PARTS for transform in (SCALED, CAPPED)
]  # fmt: skip
# A narrower dtype is rounded to where it is stored, and nowhere else.
GRADIENTS += [(torch.bfloat16, True, False, SCALED), (torch.float16, True, True, CAPPED)]


@pytest.mark.parametrize(("out", "with_grad", "with_entropy", "transform"), GRADIENTS)
def test_gradient(
    out: torch.dtype, with_grad: bool, with_entropy: bool, transform: tuple[float, float, float | None]
) -> None:
    dtype = torch.float64 if out == torch.float64 else torch.float32
    x, targets = rows(4, 110, dtype)
    bias = torch.randn(110, dtype=dtype)
    grad = torch.randn(4, dtype=dtype) if with_grad else None
    grad_entropy = torch.randn(4, dtype=dtype) if with_entropy else None
    norm, expected = gradient(x, targets, bias, transform, grad, grad_entropy)
    norm = norm[: 3 + with_entropy].to(dtype)
    found = torch.empty(4, 110, dtype=out, device=DEVICE)

    def there(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(DEVICE)

    for columns in (slice(0, 75), slice(75, 110)):
        linear.fold_backward(
            x[:, columns].contiguous().to(DEVICE), there(bias[columns]), targets.to(DEVICE), columns.start, *transform,
            norm.to(DEVICE), there(grad), there(grad_entropy), found[:, columns],
        )  # fmt: skip
    close(found.cpu(), expected, TOLERANCE[out] * expected.abs() + TOLERANCE[dtype])


@products
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradient_over_the_products(dtype: torch.dtype, softcap: float | None) -> None:
    """In place, the label's logit is read before its block is written."""
    x, targets = rows(4, 110, dtype)
    transform = (0.6, 1.3, softcap)
    grad = torch.randn(4, dtype=dtype)
    norm, _ = gradient(x, targets, None, transform, grad, grad)
    arguments = (targets.to(DEVICE), 0, *transform, norm.to(dtype).to(DEVICE), grad.to(DEVICE), grad.to(DEVICE))
    z = x.to(DEVICE)
    apart = torch.empty_like(z)
    linear.fold_backward(z, None, *arguments, apart)
    z = z.clone()
    linear.fold_backward(z, None, *arguments, z)
    assert torch.equal(z, apart)


def test_gradient_of_impossible_logits() -> None:
    """Logits of -inf and the lowest numbers get 0, and so does a label whose probability is 0, from the entropy."""
    x, targets = rows(2, 100)
    targets[:] = 40
    x[:, 60:] = -INF
    x[:, 20:30] = -3.4028234663852886e38
    g = torch.ones(2)
    entropy = -(x.double().log_softmax(1).exp() * x.double().log_softmax(1).clamp(min=-1e300)).sum(1)
    anchor = x[:, 0].double()
    norm = torch.stack([anchor, (anchor - x.double().logsumexp(1)).exp(), torch.full((2,), -INF).double(), entropy])
    out = torch.empty(2, 100, device=DEVICE)
    linear.fold_backward(
        x.to(DEVICE), None, targets.to(DEVICE), 0, 1.0, 1.0, None, norm.float().to(DEVICE), None, g.to(DEVICE), out
    )
    out = out.cpu()
    assert out.isfinite().all()
    assert (out[:, 60:] == 0).all()
    assert (out[:, 20:30] == 0).all()
    assert (out[:, 40] == 0).all()


@products
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradient_of_a_row_that_is_left_over(dtype: torch.dtype, softcap: float | None, with_entropy: bool) -> None:
    """Its anchor is inf, so that no logit of it, however large, is more than 0 times a gradient of 0."""
    norm = torch.tensor([[INF], [1.0], [0.0], [0.0]], dtype=dtype, device=DEVICE)
    none, out = torch.zeros(1, dtype=dtype, device=DEVICE), torch.full((1, 300), torch.nan, dtype=dtype, device=DEVICE)
    linear.fold_backward(
        torch.full((1, 300), 1e3, dtype=dtype, device=DEVICE), None, torch.tensor([-2], device=DEVICE), 0,
        1.0, 1.0, softcap, norm, none, none if with_entropy else None, out,
    )  # fmt: skip
    assert (out == 0).all()


def test_nothing_to_do() -> None:
    empty = torch.empty(0, device=DEVICE)
    state, none = RowSums.start((0,), torch.device(DEVICE)), torch.empty(0, dtype=torch.int64).to(DEVICE)
    linear.fold(empty.view(0, 8), None, none, 0, 1.0, 1.0, None, ALL_STATS, state, state[0], state[1], None)
    linear.fold_backward(
        empty.view(0, 8), None, none, 0, 1.0, 1.0, None, state[:3], empty, None, empty.view(0, 8)
    )  # fmt: skip

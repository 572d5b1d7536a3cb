"""The product that folds its own logits, through the public functions, against the definition in float64."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref_kernels import cpu, linear
from fastpref_kernels.contract import LINEAR_STATISTICS, RowSums, Scoring, Transform
from fastpref_kernels.eager import linear as eager_linear
from fastpref_kernels.linear import backward, finalize, forward
from fastpref_kernels.triton import launches, product
from tests.helpers import linear_logprobs
from tests.helpers.linear_logprobs import LAYOUTS, NAMES, Operands, assert_matches_reference, run
from tests.tolerance import ALL_STATS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else "xpu")
INF, NAN = math.inf, math.nan
# Small, so that a small vocabulary has several blocks of two pieces, and a few rows several groups.
LAUNCH = launches.ProductLaunch(launches.Blocks(16, 32, 32, 2, 2, 4), width=16, described=True)
EVERY = range(1 << 40)
# The interpreter multiplies the bits of bfloat16.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
modes = pytest.mark.parametrize("mode", ["save", "recompute"])


def there(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on the GPU's copies of its CPU tensors."""

    def call(*arguments: Any, **options: Any) -> Any:
        moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]
        options = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}
        result = function(*moved, **options)
        return type(result)(*(v.cpu() for v in result)) if isinstance(result, tuple) else result.cpu()

    return call


def never(*_: Any) -> None:
    raise AssertionError("a tile was folded")


BACKEND = linear.library_backend(never, linear.fold_backward, product_fold=product.product_fold)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions on the fused kernel, whatever the shape."""
    device = product._name(DEVICE)
    rows = [launches.Measured(device, dtype, EVERY, EVERY, EVERY, LAUNCH, "never") for dtype in DTYPES]
    monkeypatch.setattr(launches, "PRODUCTS", tuple(rows))
    if INTERPRETED:
        monkeypatch.setattr(cpu, "native", lambda: None)
        for name, function in {
            "linear_logprobs": linear.linear_logprobs,
            "linear_logprobs_backward": linear.linear_logprobs_backward,
            "linear_logprobs_backward_": linear.linear_logprobs_backward_,
        }.items():
            monkeypatch.setattr(torch.ops.fastpref, name, functools.partial(function, BACKEND))
    else:
        for name in NAMES:
            monkeypatch.setattr(fastpref, name, there(getattr(fastpref, name)))


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, int]]:
    """What every chunk of rows has given: anchors and masses (pieces, R), and the columns of a piece."""
    found, launcher = [], product.product_fold

    def product_fold(*arguments: Any) -> Any:
        found.append(launcher(*arguments))
        return found[-1]

    monkeypatch.setattr(product, "product_fold", product_fold)
    if INTERPRETED:
        backend = BACKEND._replace(product_fold=product_fold)
        monkeypatch.setattr(torch.ops.fastpref, "linear_logprobs", functools.partial(linear.linear_logprobs, backend))
    return found


def make(rows: tuple[int, ...], vocabulary: int, features: int = 32, **options: Any) -> tuple[Operands, Tensor]:
    """Return labels, and operands with rows of a multiple of 16 elements, as Triton 3.4's interpreter wants of them."""
    return linear_logprobs.make(rows, vocabulary, features, **options)


def skip_unless_it_may_be_kept(mode: str, dtype: torch.dtype) -> None:
    if mode == "save" and dtype == torch.float16:
        pytest.skip("fp16 has not the range of the exponentials that are kept")


@dtypes
@modes
@pytest.mark.parametrize("features", [80, 33], ids=["by descriptors", "by pointers"])
def test_modes(features: int, mode: str, dtype: torch.dtype) -> None:
    """Groups of full height and not, a prime V, an H that no block divides."""
    skip_unless_it_may_be_kept(mode, dtype)
    operands, labels = make((5, 12), 131, features, dtype=dtype)
    assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode, stats=ALL_STATS)
    assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode)


@pytest.mark.parametrize("stat", LINEAR_STATISTICS)
def test_one_statistic(stat: str) -> None:
    operands, labels = make((2, 5), 70)
    assert_matches_reference("linear_token_logprobs", operands, labels, stats=(stat,))


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 33, 64])
def test_vocabulary(vocabulary: int) -> None:
    operands, labels = make((1, 4), vocabulary, 16)
    assert_matches_reference("linear_token_logprobs", operands, labels, stats=ALL_STATS, shift=False)


@pytest.mark.parametrize("label", [0, 15, 16, 31, 32, 52])
def test_one_row(label: int) -> None:
    operands, labels = make((1, 1), 53, 7)
    labels[:] = label
    assert_matches_reference("linear_token_logprobs", operands, labels, stats=ALL_STATS, shift=False)


@modes
@pytest.mark.parametrize(
    "options", [{"temperature": 1.3, "logit_scale": 0.6}, {"temperature": 1.3, "logit_scale": 0.6, "softcap": 4.0}],
    ids=["scaled", "capped"],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_transform(bias: bool, options: dict[str, float], mode: str) -> None:
    operands, labels = make((3, 7), 83, bias=bias)
    for stats in ((), ALL_STATS):
        assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode, stats=stats, **options)


@modes
def test_packed_sequences_in_chunks_of_rows(mode: str) -> None:
    operands, labels = make((13,), 67)
    options = {"cu_seqlens": torch.tensor([0, 4, 5, 5, 13]), "reduction": "mean", "chunk_rows": 3, "mode": mode}
    assert_matches_reference("linear_sequence_logprobs", operands, labels, **options)


@pytest.mark.parametrize(("operand", "shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(operand: str, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]) -> None:
    operands, labels = make((3, 5), 37, 9)
    operands[operand] = torch.randn(shape)
    assert_matches_reference("linear_token_logprobs", operands, labels, layouts={operand: layout}, mode="save")


@modes
@pytest.mark.parametrize(
    "layout", [lambda base: base[::2, :32], lambda base: base[:53, 4:36]], ids=["every second row", "padded features"]
)  # fmt: skip
def test_weight_with_gaps_by_descriptors(layout: Callable[[Tensor], Tensor], mode: str) -> None:
    operands, labels = make((3, 5), 53)
    operands["weight"] = torch.randn(106, 48) / 6
    assert_matches_reference("linear_token_logprobs", operands, labels, layouts={"weight": layout}, mode=mode)


def rows_of(logits: Tensor) -> dict[str, Tensor]:
    """Return operands whose logits (R, V) are given."""
    weight = torch.nn.functional.pad(logits.T, (0, -len(logits) % 16))
    return {"hidden": torch.eye(*weight.T.shape[:1])[None, : len(logits)], "weight": weight}


@modes
@pytest.mark.parametrize("stats", [(), ALL_STATS], ids=["plain", "statistics"])
def test_far_above_the_label(mode: str, stats: tuple[str, ...], folded: list[tuple[Tensor, Tensor, int]]) -> None:
    """Only a piece that holds logits far above the label's is anchored higher, by as much as it needs."""
    logits = torch.rand(6, 131)
    labels = torch.tensor([[5, 5, 40, 130, 5, 5]])
    for row, gap in enumerate((60.0, 89.0, 115.0, 130.0)):
        logits[row, 70] += gap
    logits[4, [70, 100]] += torch.tensor([90.0, 62.0])
    assert_matches_reference(
        "linear_token_logprobs", rows_of(logits), labels, shift=False, mode=mode, stats=stats
    )  # fmt: skip
    anchors, _, columns = folded[-1]
    raised = anchors.cpu() > logits.gather(1, labels.T)[:, 0] + 1e-4
    wanted = torch.zeros(9, 6, dtype=torch.bool)
    wanted[4, :5] = wanted[6, 4] = True
    assert columns == 16
    assert torch.equal(raised, wanted)
    torch.testing.assert_close(anchors[4, :5].cpu(), logits[:5, 70], rtol=1e-6, atol=0)


@modes
@pytest.mark.parametrize("rest", [1e-5, 1e-7])
def test_logp_near_zero_keeps_its_digits(rest: float, mode: str) -> None:
    logits = torch.full((1, 100), 8.0 + math.log(rest / 99))
    logits[0, 99] = 8.0
    labels = torch.tensor([[99]])
    found = assert_matches_reference("linear_token_logprobs", rows_of(logits), labels, shift=False, mode=mode)
    truth = -math.log1p(math.exp(logits[0, 0].double().item() - 8.0) * 99)
    assert abs(found["logprobs"].item() / truth - 1) < 1e-4


@modes
@pytest.mark.parametrize(
    "stats", [(), tuple(name for name in ALL_STATS if name != "mean_logits")], ids=["plain", "statistics"]
)
def test_minus_infinity(mode: str, stats: tuple[str, ...]) -> None:
    """Of probability 0 wherever it is not the label, a whole block of it too, and beside a row that is raised."""
    operands, labels = make((1, 8), 100, 16)
    labels[:] = torch.randint(30, labels.shape)
    operands["bias"][40:70] = -INF
    assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode, stats=stats)
    operands["bias"][35] = 90.0
    assert_matches_reference("linear_token_logprobs", operands, labels, mode=mode, stats=stats)


@modes
@pytest.mark.parametrize("level", [0.0, -1e4])
def test_label_of_minus_infinity(level: float, mode: str) -> None:
    """Nothing is anchored at it, nor at a block without a number, far as all others are from 0."""
    logits = torch.rand(2, 100) + level
    operands = {**rows_of(logits), "bias": torch.zeros(100)}
    operands["bias"][:40] = -INF
    found = run(
        fastpref.linear_token_logprobs, operands, torch.tensor([[20, 50]]), shift=False, mode=mode, stats=("lse",)
    )
    truth = (logits.double() + operands["bias"].double()).logsumexp(1)
    torch.testing.assert_close(found["lse"][0].double(), truth, rtol=1e-6, atol=0)
    assert found["logprobs"][0, 0] == -INF
    assert found["logprobs"][0, 1].isfinite()
    assert found["dweight"].isfinite().all()


@modes
@pytest.mark.parametrize("stats", [(), ALL_STATS], ids=["plain", "statistics"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_not_a_number_harms_its_sequence_alone(value: float, stats: tuple[str, ...], mode: str) -> None:
    operands, labels = make((3, 6), 70)
    labels[1, 3] = 5
    options = {"mode": mode, "stats": stats}
    clean = run(fastpref.linear_sequence_logprobs, operands, labels, **options)
    operands["hidden"][1, 2, 4] = value
    found = run(fastpref.linear_sequence_logprobs, operands, labels, **options)
    assert found["logprobs"][1].isnan()
    if stats:
        assert not found["is_top1"][1, 2]
    for name in ("logprobs", "dhidden"):
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]])


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("column", [3, 40, 65])
def test_not_a_number_in_one_column(column: int, value: float) -> None:
    """At the label, in its block and in another one."""
    operands, labels = make((1, 4), 70)
    labels[:] = 40
    operands["bias"][column] = value
    found = run(fastpref.linear_token_logprobs, operands, labels, stats=("is_top1",))
    assert found["logprobs"].isnan().all()
    assert (found["is_top1"] == (column == 40 and value == INF)).all()


def test_ties() -> None:
    """A column that equals the label is ahead of it where it comes first, in any half of any block."""
    columns = [0, 31, 34, 36, 47, 48, 63, 64, 96]
    logits = torch.zeros(len(columns), 97) - 1
    logits[:, 35] = 2
    for row, column in enumerate(columns):
        logits[row, column] = 2
    labels = torch.full((1, len(columns)), 35)
    found = run(fastpref.linear_token_logprobs, rows_of(logits), labels, shift=False, stats=("is_top1",))
    assert found["is_top1"][0].tolist() == [column > 35 for column in columns]


@modes
@pytest.mark.parametrize("filter_eps", [1e-9, 1e-3, 0.3])
def test_filter(filter_eps: float, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out is told and chosen by tiles, of two blocks here, the last of which has one."""
    for module in (backward, eager_linear, finalize, forward):
        monkeypatch.setattr(module, "COLUMNS", 64)
    operands, labels = make((2, 6), 150)
    operands["weight"] *= 4
    options = {"mode": mode, "filter_eps": filter_eps, "stats": ("dropped_mass",)}
    found = run(fastpref.linear_token_logprobs, operands, labels, **options)
    monkeypatch.setattr(launches, "PRODUCTS", ())
    backend = linear.library_backend(linear.fold, linear.fold_backward, product_fold=product.product_fold)
    if INTERPRETED:
        monkeypatch.setattr(torch.ops.fastpref, "linear_logprobs", functools.partial(linear.linear_logprobs, backend))
    by_tiles = run(fastpref.linear_token_logprobs, operands, labels, **options)
    for name, value in found.items():
        torch.testing.assert_close(value, by_tiles[name], rtol=1e-5, atol=2e-5)
    assert found["dropped_mass"].any() or filter_eps < 1e-6


@pytest.mark.parametrize("stats", [(), ALL_STATS], ids=["plain", "statistics"])
@modes
def test_two_runs_agree_bit_for_bit(mode: str, stats: tuple[str, ...], unpoisoned: None) -> None:
    operands, labels = make((3, 9), 131, 48)
    first, second = (
        run(fastpref.linear_token_logprobs, operands, labels, mode=mode, stats=stats) for _ in range(2)
    )  # fmt: skip
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("stats", [(), ALL_STATS], ids=["plain", "statistics"])
def test_rows_do_not_depend_on_the_batch(stats: tuple[str, ...]) -> None:
    """Alone, last of its block, and beside rows with their labels in every block and far above their anchors."""
    operands, labels = make((1, 40), 131, 48)
    hidden = operands["hidden"]
    hidden[:, 1::2] *= 40
    labels[:] = torch.arange(40) * 3
    together = run(fastpref.linear_token_logprobs, operands, labels, shift=False, stats=stats)
    for row in (0, 15, 16, 38):
        alone = {**operands, "hidden": hidden[:, row : row + 1]}
        found = run(fastpref.linear_token_logprobs, alone, labels[:, row : row + 1], shift=False, stats=stats)
        for name in ("logprobs", *stats):
            assert torch.equal(found[name][0, 0], together[name][0, row]), name


def test_what_a_descriptor_loads() -> None:
    base = torch.zeros(80, 80)
    assert all(map(product._fits_descriptor, (base, base[:, :17], base[::3, 4:20], base[7:, :12])))
    others = [base.T, base[:, 1:17], base[:, ::2], base[:1].expand(80, 80), base[:0], torch.zeros(80, 17)]
    assert not any(map(product._fits_descriptor, others))


def call(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, store: Tensor) -> tuple[Tensor, ...]:
    """State, anchors and masses of a call of the launcher itself."""
    scoring = Scoring(-100, True, 1.0, 1.0, softcap)
    state = RowSums.start((len(x),), torch.device("cpu"))
    head = forward.Head(weight, None, scoring, 0)
    RowSums.of(state).anchor.copy_(forward.label_logits(BACKEND, x, head, targets))
    state = state.to(DEVICE)
    operands = (x.to(DEVICE), weight.to(DEVICE), None, targets.to(DEVICE))
    done = product.product_fold(*operands, *scoring.transform, 0, state, store)
    assert done is not None
    return state.cpu(), done[0].cpu(), done[1].cpu()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_bfloat16_store_beyond_32_bits(unpoisoned: None, softcap: float | None) -> None:
    """The last of three rows of a store begins beyond 2³¹ elements; only what is written is ever touched."""
    stride = 2**31 - 8
    try:
        store = torch.empty(2 * stride + 100, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("8 GiB cannot be reserved")
    kept = store.as_strided((3, 90), (stride, 1))
    store.as_strided((3, 100), (stride, 1))[:, 90:] = 7.0
    x, weight, targets = torch.randn(3, 16), torch.randn(90, 16), torch.tensor([0, 50, 89])
    weight[64:80] *= 30
    state, anchors, masses = call(x, weight, targets, softcap, kept)
    z, slope = Transform.of(1.0, 1.0, softcap).z(x.double() @ weight.double().T)
    own = torch.arange(90) == targets[:, None]
    e = (z - anchors.repeat_interleave(16, 0)[:90].T).exp().masked_fill(own, 0.0)
    # The interpreter cuts a float32 off where a GPU rounds it; where the cap is reached, little is left of the slope.
    bound = (2.0**-7 if INTERPRETED else 2.0**-8) * e * slope + 1e-5 * e + torch.finfo(torch.float32).tiny
    assert ((kept.cpu().double() - e * slope).abs() <= bound).all()
    torch.testing.assert_close(masses.T.double(), torch.stack([p.sum(1) for p in e.split(16, 1)], 1), rtol=1e-4, atol=0)
    torch.testing.assert_close(RowSums.of(state).label, z[own], rtol=1e-5, atol=1e-5)
    assert (store.as_strided((3, 100), (stride, 1))[:, 90:] == 7.0).all(), "something was written beyond the columns"


@pytest.mark.parametrize("dead", [False, True])
def test_labels_of_other_shards(unpoisoned: None, dead: bool) -> None:
    """Every column counts, and no label's logit is found, in the padding of the last block either."""
    x, weight = torch.randn(4, 16), torch.randn(90, 16)
    shard = torch.tensor([1000, 2000])
    labels = torch.tensor([[5, 1999, 1090, 1100]])  # before, far after, and just past these columns
    targets = linear.shard_labels(labels, None, shard, 90, -100, False, True)[0]
    if dead:
        weight[:] = -torch.inf
        x = x.abs()
    state, anchors, masses = call(x, weight, targets, None, torch.empty(4, 90))
    z = x.double() @ weight.double().T
    sums = RowSums.of(state)
    assert (sums.label == 0).all()
    if dead:
        assert (sums.anchor == -torch.inf).all()
        assert (sums.rest == 0).all()
    else:
        torch.testing.assert_close(sums.anchor + sums.rest.log(), z.logsumexp(-1), rtol=1e-5, atol=1e-5)
        of_piece = (masses.double().log() + anchors).T
        wanted = torch.stack([part.logsumexp(1) for part in z.split(16, 1)], 1)
        torch.testing.assert_close(of_piece, wanted, rtol=1e-5, atol=1e-5)


def test_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = LAUNCH._replace(width=32)
    table = (
        launches.Measured("H", torch.bfloat16, range(1, 1000), range(64, 129), range(1, 50000), LAUNCH, "one day"),
        launches.Measured("H", torch.bfloat16, range(1000, 9000), EVERY, EVERY, wide, "another"),
    )
    monkeypatch.setattr(launches, "PRODUCTS", table)
    assert launches.product_launch("H", torch.bfloat16, 999, 128, 49999) is LAUNCH
    assert launches.product_launch("H", torch.bfloat16, 1000, 128, 49999) is wide
    others = [("A", torch.bfloat16, 999, 128), ("H", torch.float16, 999, 128), ("H", torch.bfloat16, 999, 129)]
    assert [launches.product_launch(*other, 49999) for other in others] == [None] * 3
    arguments = (torch.zeros(2, 8), torch.zeros(40, 8), None, torch.zeros(2).long(), 1.0, 1.0, None, 0)
    assert product.product_fold(*arguments, torch.zeros(9, 2), None) is None

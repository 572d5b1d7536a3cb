"""Every kernel compiled, not run, for the GPUs it is meant for: nothing spills, memory is accessed 16 bytes at a time,
and the loops over the logits are short enough to be bound by memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from benchmarks import sass
from fastpref_kernels.triton import linear, logprobs, losses

TARGETS = tuple(sass.TARGETS)
ALL_STATS = 31


def score(
    dtype: torch.dtype, V: int, *, row: int | None = None, stats: int = 0, reduction: str = "none",
    softcap: float | None = None, packed: bool = False, stride: int = 1, in_place: bool = False,
) -> Callable[[], object]:  # fmt: skip
    """What launches the forward and the backward as their operators do; a row lies in `row` elements, V where None."""

    def launch() -> None:
        logits = torch.zeros(2, 8, row or V, stride, dtype=dtype)[..., :V, 0]
        labels = torch.zeros(2, 8, dtype=torch.int64)
        cu_seqlens = weights = None
        if packed:
            logits, labels = logits.view(1, 16, V), labels.view(1, 16)
            cu_seqlens, weights = torch.tensor([0, 5, 16]), torch.ones(1, 15)
        scoring = (-100, True, 1.0, 1.0, softcap, reduction)
        logps, sequences, norm, counts, *_ = logprobs.logprobs(logits, labels, cu_seqlens, weights, *scoring, stats)
        grad = torch.ones_like(logps if reduction == "none" else sequences)
        out = logits if in_place else torch.empty_like(logits)
        saved = (logits, labels, cu_seqlens, weights, norm, counts)
        logprobs.write_gradient(out, grad, torch.ones_like(logps) if stats else None, *saved, *scoring)

    return launch


def tile(
    *, stats: int = 0, C: int = 4096, R: int = 8, column: int = 0, store: torch.dtype | None = torch.bfloat16,
    out: torch.dtype = torch.bfloat16, bias: torch.dtype | None = None, softcap: float | None = None,
    products: torch.dtype = torch.float32,
) -> Callable[[], object]:  # fmt: skip
    """What launches the row pass over a tile of products, and the tile's gradient."""

    def launch() -> None:
        z, targets, label = torch.zeros(R, C, dtype=products), torch.zeros(R, dtype=torch.int64), torch.zeros(R)
        added = None if bias is None else torch.zeros(C, dtype=bias)
        state, (anchors, masses) = torch.zeros(8, R, dtype=torch.float64), torch.zeros(2, R, dtype=torch.float64)
        kept = None if store is None else torch.zeros(R, C, dtype=store)
        transform = (1.0, 1.0, softcap)
        linear.fold(z, added, targets, column, *transform, stats, state, anchors, masses, kept)
        grad_entropy = label if stats else None
        gradient, norm = torch.zeros(R, C, dtype=out), torch.zeros(4, R, dtype=products)
        linear.fold_backward(z, added, targets, column, *transform, norm, label, grad_entropy, gradient)

    return launch


def rank(K: int, masked: bool) -> Callable[[], object]:
    rewards, ranks = torch.zeros(64, K), torch.zeros(64, K, dtype=torch.int64)
    return lambda: losses.ranking_loss(rewards, ranks, ranks == 0 if masked else None, "mean")


ALIGNED = {
    "bf16": score(torch.bfloat16, 128256),
    "bf16, V of no multiple of 8": score(torch.bfloat16, 50257, row=50304, in_place=True),
    "bf16, every statistic": score(torch.bfloat16, 128256, stats=ALL_STATS),
    "fp16, weighted sums of packed sequences": score(torch.float16, 128256, reduction="sum", packed=True),
    "fp32, means of sequences, capped": score(torch.float32, 50304, reduction="mean", softcap=30.0),
}
TILES = {
    "tile": tile(),
    "tile, not stored": tile(store=None, out=torch.float16),
    "tile, what a loss asks for": tile(stats=linear.ENTROPY.value | linear.MEAN.value | linear.TOP1.value),
    "tile, what a loss asks for, not stored": tile(
        stats=linear.ENTROPY.value | linear.MEAN.value | linear.TOP1.value, store=None
    ),
    "tile, every statistic, fp32 stored": tile(stats=ALL_STATS, store=torch.float32, out=torch.float32),
    "tile, bias, capped": tile(stats=ALL_STATS, bias=torch.bfloat16, softcap=30.0),
    "fp64 tile, capped": tile(
        stats=ALL_STATS, products=torch.float64, store=torch.float64, out=torch.float64, softcap=30.0
    ),
}
UNALIGNED = {
    "bf16, rows of no multiple of 8": score(torch.bfloat16, 50257),
    "fp64, strided vocabulary": score(torch.float64, 4096, stride=2),
    "tile, rows of no multiple of 4": tile(stats=ALL_STATS, C=1001),
}
LOSSES = {
    "dpo": lambda: losses.dpo_loss(*torch.zeros(4, 4096).unbind(), "sigmoid", 0.1, 0.1, "mean"),
    "pairwise reward": lambda: losses.pairwise_reward_loss(*torch.zeros(3, 64).unbind(), 0.0, 0.01, "mean"),
    "best of k": lambda: losses.best_of_k_loss(torch.zeros(64, 4), torch.zeros(64, dtype=torch.int64), "mean"),
    "ranking, K=4": rank(4, masked=False),
    "ranking, K=64, masked": rank(64, masked=True),
}
CASES = {**ALIGNED, **TILES, **UNALIGNED, **LOSSES}


@cache
def programs(name: str, target: str) -> tuple[sass.Program, ...]:
    with sass.compiling(target) as compiled:
        CASES[name]()
    assert compiled
    return tuple(sass.read(kernel, target) for kernel in compiled)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_nothing_spills(name: str, target: str) -> None:
    found = {program.name: (program.spills, program.stack) for program in programs(name, target)}
    assert found == dict.fromkeys(found, (0, 0)), "(instructions that spill, bytes of stack) of every kernel"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ALIGNED)
def test_logits_move_16_bytes_at_a_time(name: str, target: str) -> None:
    forward, backward = (program.passes[0] for program in programs(name, target))
    assert set(forward.widths("load")) == {16}
    assert set(backward.widths("load")) == {16}
    assert set(backward.widths("store")) == {16}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TILES)
def test_tiles_move_16_bytes_at_a_time(name: str, target: str) -> None:
    """A bias and a stored tile may be narrower than products: 16 bytes of these are then 8 of those on AMD's lanes."""
    forward, backward = (program.passes[0] for program in programs(name, target))
    narrow = {8, 16} if target == "gfx942" else {16}
    assert 16 in forward.widths("load")
    assert set(forward.widths("load")) <= narrow
    assert set(forward.widths("store")) <= narrow
    assert set(backward.widths("load")) == {16}
    assert set(backward.widths("store")) == {16}


def test_a_tile_of_another_size_is_no_other_kernel() -> None:
    sizes = [{}, {"C": 16384, "column": 16384}, {"R": 1, "column": 1}, {"R": 16, "C": 1024, "column": 4096}]
    found = []
    for size in sizes:
        with sass.compiling("sm_90") as compiled:
            tile(stats=ALL_STATS, **size)()
        found.append({id(kernel) for kernel in compiled})
    assert all(kernels == found[0] for kernels in found), "kernels of every size"


def instructions_per_logit(program: sass.Program, itemsize: int = 2) -> float:
    loop = program.passes[0]
    return len(loop.instructions) / program.logits(loop, itemsize)


@pytest.mark.parametrize("name", ["bf16", "bf16, V of no multiple of 8"])
def test_instructions_per_logit(name: str) -> None:
    forward, backward = map(instructions_per_logit, programs(name, "sm_90"))
    assert forward <= 7
    assert backward <= 16


@pytest.mark.parametrize(
    ("name", "fold", "gradient"),
    [
        ("tile, not stored", 5, 7),
        ("tile", 8, 7),
        ("tile, what a loss asks for, not stored", 10, 11),
        ("tile, what a loss asks for", 12, 11),
    ],
)
def test_instructions_per_product(name: str, fold: float, gradient: float) -> None:
    """An H200 issues 31 in the time that it reads a float32."""
    forward, backward = (instructions_per_logit(program, itemsize=4) for program in programs(name, "sm_90"))
    assert forward <= fold
    assert backward <= gradient


def test_unaligned_rows_are_still_bound_by_memory() -> None:
    """An H200 issues 15.5 instructions in the time of a bf16 logit read, and 31 where one is written too."""
    forward, backward = map(instructions_per_logit, programs("bf16, rows of no multiple of 8", "sm_90"))
    assert forward <= 15.5
    assert backward <= 31

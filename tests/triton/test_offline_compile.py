"""Every kernel compiled, not run, for the GPUs it is meant for: nothing spills, memory is accessed 16 bytes at a time,
and the loops over the logits are short enough to be bound by memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError

from benchmarks import sass
from fastpref.losses import LOSS_TYPES
from fastpref_kernels.contract import LINEAR_STATISTICS, STATISTICS, RowSums, Statistic
from fastpref_kernels.triton import gae, launches, linear, logprobs, product
from fastpref_kernels.triton.losses import preference, reward
from tests.triton.linkers import TRITON, skip_without_linker

TARGETS = tuple(sass.TARGETS)
ALL_STATS = sum(STATISTICS.values())
LOSS_STATS = (Statistic.ENTROPY | Statistic.MEAN_LOGITS | Statistic.IS_TOP1).value


def score(
    dtype: torch.dtype, V: int, *, row: int | None = None, stats: int = 0, reduction: str = "none",
    softcap: float | None = None, packed: bool = False, stride: int = 1, in_place: bool = False, begin: int = 0,
) -> Callable[[], object]:  # fmt: skip
    """What launches the forward and the backward as their operators do; a row lies in `row` elements, V where None.

    The logits begin `begin` elements into their memory.
    """

    def launch() -> None:
        memory = torch.zeros(begin + 2 * 8 * (row or V) * stride, dtype=dtype)
        logits = memory[begin:].view(2, 8, row or V, stride)[..., :V, 0]
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
        logprobs.logprobs_backward(out, grad, torch.ones_like(logps) if stats else None, *saved, *scoring)

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
        state, (anchors, masses) = RowSums.start((R,), z.device), torch.zeros(2, R, dtype=torch.float64)
        kept = None if store is None else torch.zeros(R, C, dtype=store)
        transform = (1.0, 1.0, softcap)
        linear.fold(z, added, targets, column, *transform, stats, state, anchors, masses, kept)
        grad_entropy = label if stats else None
        gradient, norm = torch.zeros(R, C, dtype=out), torch.zeros(4, R, dtype=products)
        linear.fold_backward(z, added, targets, column, *transform, norm, label, grad_entropy, gradient)

    return launch


def fused(
    blocks: tuple[int, int, int], *, warps: int = 4, stages: int = 2, described: bool = False, stats: int = 0,
    dtype: torch.dtype = torch.bfloat16, store: bool = True, bias: bool = False, softcap: float | None = None,
    R: int = 8, V: int = 8192, H: int = 256,
) -> Callable[[], object]:  # fmt: skip
    """What launches the product that folds its own logits, in blocks of rows, columns and terms, and what adds up."""

    def launch() -> None:
        x, weight, targets = torch.zeros(R, H, dtype=dtype), torch.zeros(V, H, dtype=dtype), torch.zeros(R).long()
        added = torch.zeros(V, dtype=dtype) if bias else None
        state, kept = RowSums.start((R,), x.device), torch.zeros(R, V, dtype=dtype) if store else None
        cut = launches.Blocks(*blocks, group_m=8, stages=stages, warps=warps)
        chosen = launches.ProductLaunch(cut, width=64, described=described)
        with mock.patch.object(launches, "product_launch", return_value=chosen):
            product.product_fold(x, weight, added, targets, 1.0, 1.0, softcap, stats, state, kept)

    return launch


def rank(K: int, masked: bool) -> Callable[[], object]:
    rewards, ranks = torch.zeros(64, K), torch.zeros(64, K, dtype=torch.int64)
    mask = ranks == 0 if masked else None

    def launch() -> None:
        reward.ranking_loss(rewards, ranks, mask, "mean")
        reward.plackett_luce_loss(rewards, ranks, mask, "mean")

    return launch


def pairs(name: str, *, everything: bool = False, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """A preference loss; with a divergence, lengths, margins, weights and a likelihood beside it, too."""
    tensors = torch.zeros(8, 4096, dtype=dtype).unbind()
    if not everything:
        tensors = (*tensors[:4], None, None, None, None)
    scalars = (0.1, 0.1, 0.0, everything, "alpha" if everything else "reverse_kl", 0.5, 0.0, 0.5, 0.05)
    likelihood = (0.3 if everything else 0.0, "token")
    return lambda: preference.dpo_loss(*tensors, name, 1.0, *scalars, *likelihood, "mean")


def unpaired() -> None:
    logps = torch.zeros(3, 4096).unbind()
    preference.kto_loss(*logps[:2], logps[0] == 0, logps[2], 0.0, 0.1, 1.0, 1.0, "mean")


ALIGNED = {
    "bf16": score(torch.bfloat16, 128256),
    "bf16, V of no multiple of 8": score(torch.bfloat16, 50257, row=50304, in_place=True),
    "bf16, what a loss asks for": score(torch.bfloat16, 128256, stats=LOSS_STATS),
    "bf16, every statistic": score(torch.bfloat16, 128256, stats=ALL_STATS),
    "fp16, weighted sums of packed sequences": score(torch.float16, 128256, reduction="sum", packed=True),
    "fp32, what a loss asks for": score(torch.float32, 128256, stats=LOSS_STATS),
    "fp32, means of sequences, capped": score(torch.float32, 50304, reduction="mean", softcap=30.0),
}
TILES = {
    "tile": tile(),
    "tile, not stored": tile(store=None, out=torch.float16),
    "tile, what a loss asks for": tile(stats=LOSS_STATS),
    "tile, what a loss asks for, not stored": tile(stats=LOSS_STATS, store=None),
    "tile, every statistic, fp32 stored": tile(stats=ALL_STATS, store=torch.float32, out=torch.float32),
    "tile, bias, capped": tile(stats=ALL_STATS, bias=torch.bfloat16, softcap=30.0),
    "fp64 tile, capped": tile(
        stats=ALL_STATS, products=torch.float64, store=torch.float64, out=torch.float64, softcap=30.0
    ),
}
UNALIGNED = {
    "bf16, rows of no multiple of 8": score(torch.bfloat16, 50257),
    "bf16, rows that begin between multiples of 16 bytes": score(torch.bfloat16, 4096, begin=1),
    "bf16, strided vocabulary, what a loss asks for": score(torch.bfloat16, 4096, stride=2, stats=LOSS_STATS),
    "fp64, strided vocabulary": score(torch.float64, 4096, stride=2),
    "tile, rows of no multiple of 4": tile(stats=ALL_STATS, C=1001),
}
PRODUCTS = {
    "product, stored": fused((128, 64, 64)),
    "product, every statistic, bias, capped": fused((64, 64, 64), stats=ALL_STATS, bias=True, softcap=30.0),
    "fp32 product, stored": fused((64, 64, 32), dtype=torch.float32),
}
# As wide as one program can hold, which is where most is to be had of sm_90.
WIDE = {
    "wide product": fused((128, 256, 64), warps=8, stages=3, described=True, store=False),
    "wide product, stored": fused((128, 256, 64), warps=8, stages=3, described=True),
    "wide product, every statistic but the margin": fused(
        (128, 256, 64), warps=8, stages=3, described=True, stats=ALL_STATS & ~Statistic.TOP2_MARGIN.value
    ),
    "wide product, every statistic": fused((128, 256, 64), warps=8, stages=3, described=True, stats=ALL_STATS),
    "wide product, by pointers": fused((128, 256, 64), warps=8, stages=3, store=False),
    "wide product, by pointers, stored": fused((128, 256, 64), warps=8, stages=3),
}
LOSSES = {
    "dpo": pairs("sigmoid"),
    "dpo, everything": pairs("sigmoid", everything=True),
    "dpo, everything, fp64": pairs("discopop", everything=True, dtype=torch.float64),
    "aot": pairs("aot"),
    "orpo": pairs("orpo"),
    "kto": unpaired,
    "pairwise reward": lambda: reward.pairwise_reward_loss(*torch.zeros(3, 64).unbind(), 0.0, 0.01, "mean"),
    "best of k": lambda: reward.best_of_k_loss(torch.zeros(64, 4), torch.zeros(64, dtype=torch.int64), "mean"),
    "ranking, K=4": rank(4, masked=False),
    "ranking, K=64, masked": rank(64, masked=True),
}
CASES = {**ALIGNED, **TILES, **UNALIGNED, **LOSSES, **PRODUCTS}


# A launch with statistics of every kernel that has some.
WITH_STATISTICS: dict[str, tuple[dict[str, Statistic], Callable[[int], Callable[[], object]]]] = {
    "logits": (STATISTICS, lambda stats: score(torch.bfloat16, 4096, stats=stats)),
    "tile": (LINEAR_STATISTICS, lambda stats: tile(stats=stats)),
    "product": (LINEAR_STATISTICS, lambda stats: fused((64, 64, 32), stats=stats)),
}


@pytest.mark.parametrize(
    ("name", "statistic"),
    [(name, statistic) for name, (statistics, _) in WITH_STATISTICS.items() for statistic in statistics],
)
def test_a_statistic_has_a_branch(name: str, statistic: str) -> None:
    statistics, launch = WITH_STATISTICS[name]
    with sass.compiling("sm_90") as compiled:
        launch(int(statistics[statistic]))()
    assert compiled


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_statistic_without_a_branch_does_not_compile(name: str) -> None:
    _, launch = WITH_STATISTICS[name]
    with sass.compiling("sm_90"), pytest.raises(CompilationError) as caught:
        launch(2 * max(LINEAR_STATISTICS.values()))()
    error: BaseException | None = caught.value
    while error is not None and "no branch for one of these statistics" not in str(error):
        error = error.__cause__
    assert error is not None, caught.value


@cache
def programs(name: str, target: str) -> tuple[sass.Program, ...]:
    skip_without_linker(target)
    with sass.compiling(target) as compiled:
        {**CASES, **WIDE}[name]()
    assert compiled
    return tuple(sass.read(kernel, target) for kernel in compiled)


@pytest.mark.slow
# The targets of NVIDIA have the same registers, and a loss needs few of them: one of these targets will do.
def test_a_row_that_is_summed_again_waits_for_all_threads() -> None:
    """They read its partial sums before one writes there; only a reduction over several warps keeps these apart."""
    for (kernel, itemsize), (block, warps, _) in launches.ROWS.items():
        if kernel in ("logprobs_forward", "logprobs_statistics"):
            assert warps == 1 or block // 4 // (16 // itemsize) > 32


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for target in TARGETS for name in CASES if name not in LOSSES or target in ("sm_90", "gfx942")],
)
def test_nothing_spills(name: str, target: str) -> None:
    found = {program.name: (program.spills, program.stack) for program in programs(name, target)}
    if (name, target) == ("tile, bias, capped", "sm_80") and TRITON not in ((3, 6), (3, 9)):
        # Triton 3.4 and 3.8 keep 8 bytes of a pass on the stack, which memory bounds all the same.
        spills, stack = found.pop("fold_kernel")
        assert spills <= 3
        assert stack <= 8
    assert found == dict.fromkeys(found, (0, 0)), "(instructions that spill, bytes of stack) of every kernel"


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_no_type_of_preference_loss_spills(name: str) -> None:
    with sass.compiling("sm_90") as compiled:
        pairs(name)()
    found = [sass.read(kernel, "sm_90") for kernel in compiled]
    assert len(found) == 1 + name.startswith("aot")
    assert all((program.spills, program.stack) == (0, 0) for program in found)


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_run_on_tensor_cores_and_move_16_bytes_at_a_time(name: str, target: str) -> None:
    """But float32, which NVIDIA's would round, and bfloat16 as AMD's lanes hold it. A row with another anchor is stored
    again, hence twice."""
    program, _ = programs(name, target)
    fp32 = name.startswith("fp32")
    width = 8 if target == "gfx942" and not fp32 else 16
    assert any(i.pipe == "tensor" for i in program.instructions) == (not fp32 or target == "gfx942")
    product_loop = max(program.loops, key=lambda loop: loop.bytes("load"))
    assert set(product_loop.widths("load")) == {16}
    block = program.constants["BLOCK_M"] * program.constants["BLOCK_N"]
    stores = sum(i.access == ("store", width) for i in program.instructions)
    assert stores >= 2 * block * (4 if fp32 else 2) // (width * program.threads)


@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        ("wide product", 8),
        ("wide product, stored", 11),
        ("wide product, every statistic but the margin", 26),
        ("wide product, every statistic", 30),
    ],
)
def test_instructions_of_a_fold_in_registers(name: str, instructions: float) -> None:
    """An H200 issues 8 in the time of an exponential, and 256 in that of a logit's product at H = 4096."""
    program, _ = programs(name, "sm_90")
    logits = program.constants["BLOCK_M"] * program.constants["BLOCK_N"] // program.threads
    assert program.epilogue / logits <= instructions


@pytest.mark.parametrize("name", WIDE)
def test_a_wide_product_is_fed_to_tensor_cores_without_spilling(name: str) -> None:
    program, _ = programs(name, "sm_90")
    assert (program.spills, program.stack) == (0, 0)
    opcodes = {i.opcode.split(".")[0] for i in program.instructions}
    assert {"HGMMA", "LDGSTS" if "pointers" in name else "UTMALDG"} <= opcodes


@pytest.mark.parametrize("described", [False, True], ids=["pointers", "descriptors"])
def test_a_product_of_another_size_is_no_other_kernel(described: bool) -> None:
    found = []
    for size in ({}, {"R": 1}, {"R": 16}, {"R": 1000, "V": 8193}):
        with sass.compiling("sm_90") as compiled:
            fused((64, 64, 32), described=described, store=False, **size)()
        found.append({id(kernel) for kernel in compiled})
    assert all(kernels == found[0] for kernels in found), "kernels of every size"


def test_a_tile_of_another_size_is_no_other_kernel() -> None:
    sizes = [{}, {"C": 16384, "column": 16384}, {"R": 1, "column": 1}, {"R": 16, "C": 1024, "column": 4096}]
    found = []
    for size in sizes:
        with sass.compiling("sm_90") as compiled:
            tile(stats=ALL_STATS, **size)()
        found.append({id(kernel) for kernel in compiled})
    assert all(kernels == found[0] for kernels in found), "kernels of every size"


def slid(value: Any) -> Any:
    """The same small tensor one element further into its memory: not where a vector of 16 bytes begins."""
    if not isinstance(value, Tensor) or value.dim() == 3:
        return value
    return torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)


def every_launcher(sequences: int, by: Callable[[Any], Any]) -> None:
    """Launch every kernel but those on tiles, with as many sequences, and with `by` of every tensor but logits."""
    T, V, K = 5 * sequences, 4096, 4
    logits, labels = torch.zeros(1, T, V, dtype=torch.bfloat16), torch.zeros(1, T, dtype=torch.int64)
    cu_seqlens, weights = torch.arange(sequences + 1) * 5, torch.ones(1, T - 1)
    for packed in ((None, None), (cu_seqlens, weights)):
        scoring = (-100, True, 1.0, 1.0, None, "sum", ALL_STATS)
        logps, sums, norm, counts, *_ = logprobs.logprobs(*map(by, (logits, labels, *packed)), *scoring)
        given = (torch.empty_like(logits), sums, logps, logits, labels, *packed, norm, counts)
        logprobs.logprobs_backward(*map(by, given), *scoring[:-1])
    ends, ranks = torch.zeros(10, sequences), torch.zeros(sequences, K, dtype=torch.int64)
    rewards = torch.zeros(sequences, K)
    scalars = (1.0, 0.1, 0.1, 0.0, True, "alpha", 0.5, 0.0, 0.5, 0.05, 0.3, "token", "mean")
    for loss_type in ("sigmoid", "aot"):
        preference.dpo_loss(*map(by, ends[:8]), loss_type, *scalars)
    preference.kto_loss(*map(by, (ends[0], ends[1], ends[2] == 0, ends[3])), 0.0, 0.1, 1.0, 1.0, "mean")
    reward.pairwise_reward_loss(*map(by, ends[:3]), 0.0, 0.01, "mean")
    reward.best_of_k_loss(by(rewards), by(ranks[:, 0]), "mean")
    reward.ranking_loss(*map(by, (rewards, ranks, ranks == 0)), "mean")
    gae.gae(*map(by, (rewards, rewards, rewards == 0)), 1.0, 0.95)


@pytest.mark.parametrize(
    ("sequences", "by"),
    [(7, lambda x: x), (16, lambda x: x), (1, slid), (7, slid)],
    ids=["7", "16", "1 slid", "7 slid"],
)
def test_another_batch_is_no_other_kernel(sequences: int, by: Callable[[Any], Any]) -> None:
    """Neither its size nor where its small tensors begin compiles anything in the middle of training."""
    found = []
    for batch in ((8, lambda x: x), (sequences, by)):
        with sass.compiling("sm_90") as compiled:
            every_launcher(*batch)
        found.append([(kernel.name, id(kernel)) for kernel in compiled])
    assert {name for name, _ in found[0]} >= {
        "logprobs_backward_kernel",
        "order_kernel",
        "ranking_kernel",
        "gae_kernel",
    }
    assert found[0] == found[1]


def test_another_number_of_programs_for_a_row_is_no_other_kernel() -> None:
    found = []
    for number in (1, 2, 16):
        with mock.patch.object(launches, "row_programs", return_value=number), sass.compiling("sm_90") as compiled:
            score(torch.bfloat16, 128256)()
        assert compiled.programs == [14 * number, 16 * number]
        found.append([id(kernel) for kernel in compiled])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("stages", [3, 4])
def test_stages_load_ahead(stages: int) -> None:
    """A launch of several stages copies to shared memory asynchronously, a stage for every load in flight."""
    kernels = ("logprobs_forward", "logprobs_backward", "logprobs_statistics")
    deep = {(kernel, 2): launches.Launch(2048, 4, stages) for kernel in kernels}
    for stats in (0, ALL_STATS):
        with mock.patch.dict(launches.ROWS, deep), sass.compiling("sm_90") as compiled:
            score(torch.bfloat16, 128256, stats=stats)()
        for program in (sass.read(kernel, "sm_90") for kernel in compiled):
            assert (program.spills, program.stack) == (0, 0)
            assert any(i.opcode.startswith("LDGSTS") for i in program.instructions)
            assert program.shared >= 2048 * 2 * (stages - 1)


def instructions_per_logit(program: sass.Program, itemsize: int = 2) -> float:
    loop = program.passes[0]
    return len(loop.instructions) / program.logits(loop, itemsize)


@pytest.mark.parametrize("name", ["bf16", "bf16, V of no multiple of 8"])
def test_instructions_per_logit(name: str) -> None:
    forward, backward = map(instructions_per_logit, programs(name, "sm_90"))
    assert forward <= 7.1
    assert backward <= 7


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["bf16", "bf16, what a loss asks for", "fp32, what a loss asks for"])
def test_copies_in_flight_cover_the_latency_of_memory(name: str, target: str) -> None:
    """An H200 needs some 33 KiB a multiprocessor at all times, where memory answers after a microsecond."""
    program = programs(name, target)[0]
    loop, warps = program.passes[0], program.threads // 32
    copies = [i.access[1] for i in loop.instructions if i.access and i.opcode.startswith("LDGSTS")]
    assert set(copies) == {16}
    by_registers = 4 * (512 // (-(-program.registers // 8) * 8)) // warps
    resident = min(by_registers, 64 // warps, 32, (228 << 10) // (program.shared + 1024))
    assert resident * program.threads * sum(copies) * (program.constants["STAGES"] - 1) >= 64 << 10


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_statistics_are_kept_by_each_thread(itemsize: int, target: str) -> None:
    """Their sums and maxima take no barrier, no shuffle and no shared memory; only copies ahead of use do."""
    name = f"{'bf16' if itemsize == 2 else 'fp32'}, what a loss asks for"
    key = ("logprobs_statistics", itemsize)
    with mock.patch.dict(launches.ROWS, {key: launches.ROWS[key]._replace(stages=1)}), sass.compiling(target) as found:
        CASES[name]()
    program = sass.read(found[0], target)
    loop = program.passes[0]
    waiting = [i.opcode for i in loop.instructions if i.opcode.startswith(("BAR", "SHFL", "REDUX", "VOTE", "LDS"))]
    assert waiting == []
    assert set(loop.widths("load")) == {16}
    assert loop.count("special") >= program.logits(loop, itemsize), "an exponential a logit"
    assert instructions_per_logit(program, itemsize) <= 11.5
    assert instructions_per_logit(programs(name, target)[0], itemsize) <= 12.3, "with copies ahead of use"


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


@pytest.mark.parametrize(
    "name", ["bf16, rows that begin between multiples of 16 bytes", "bf16, strided vocabulary, what a loss asks for"]
)
def test_logits_of_any_layout_are_summed_by_each_thread(name: str) -> None:
    """No lane is spread over several threads, which would take shuffles, and the lanes of a thread fit in registers."""
    program = programs(name, "sm_90")[0]
    assert program.passes[0].shuffles == 0
    assert program.registers <= 128
    assert (program.spills, program.stack) == (0, 0)


def test_unaligned_rows_are_still_bound_by_memory() -> None:
    """An H200 issues 15.5 instructions in the time of a bf16 logit read, and 31 where one is written too."""
    forward, backward = map(instructions_per_logit, programs("bf16, rows of no multiple of 8", "sm_90"))
    assert forward <= 15.5
    assert backward <= 31
